"""Merging methods by the name that recipes use. Importing them loads no torch."""

from __future__ import annotations

from vlmgraft.methods.curvature import Curvature
from vlmgraft.methods.dare_linear import DareLinear
from vlmgraft.methods.dare_ties import DareTies
from vlmgraft.methods.frank import Frank
from vlmgraft.methods.frism import Frism
from vlmgraft.methods.ip_merging import IpMerging
from vlmgraft.methods.layer_swap import LayerSwap
from vlmgraft.methods.linear import Linear
from vlmgraft.methods.spectral import Spectral
from vlmgraft.methods.task_arithmetic import TaskArithmetic
from vlmgraft.methods.ties import Ties

METHODS: dict[str, type] = {
    cls.name: cls
    for cls in (
        Linear,
        TaskArithmetic,
        LayerSwap,
        Ties,
        DareLinear,
        DareTies,
        IpMerging,
        Frank,
        Spectral,
        Frism,
        Curvature,
    )
}
