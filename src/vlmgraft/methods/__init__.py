"""Merging methods by the name that recipes use. Importing them loads no torch."""

from __future__ import annotations

from vlmgraft.methods.base import Method
from vlmgraft.methods.breadcrumbs import Breadcrumbs
from vlmgraft.methods.curvature import Curvature
from vlmgraft.methods.dare import DareLinear, DareTies
from vlmgraft.methods.della import Della
from vlmgraft.methods.frank import Frank
from vlmgraft.methods.frism import Frism
from vlmgraft.methods.ip_merging import IpMerging
from vlmgraft.methods.linear import LayerSwap, Linear
from vlmgraft.methods.model_stock import ModelStock
from vlmgraft.methods.sce import Sce
from vlmgraft.methods.slerp import Slerp
from vlmgraft.methods.spectral import Spectral
from vlmgraft.methods.task_arithmetic import TaskArithmetic
from vlmgraft.methods.ties import Ties

METHODS: dict[str, type[Method]] = {
    cls.name: cls
    for cls in (
        Linear,
        TaskArithmetic,
        LayerSwap,
        Ties,
        DareLinear,
        DareTies,
        Della,
        Breadcrumbs,
        Sce,
        ModelStock,
        Slerp,
        IpMerging,
        Frank,
        Spectral,
        Frism,
        Curvature,
    )
}
