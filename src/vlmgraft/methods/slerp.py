"""Spherical interpolation of VLM and donor, tensor by tensor, as in mergekit's `slerp`; needs no base.

    W = (sin((1 − t)·θ)·W_vlm + sin(t·θ)·W_donor) / sin θ,    cos θ = ⟨W_vlm, W_donor⟩/(‖W_vlm‖·‖W_donor‖)

t = 0 is the VLM bit for bit, t = 1 the donor. Where |cos θ| > 0.9995 the mean (1 − t)·W_vlm + t·W_donor is taken:
tensors of models of one base are about that close, so that slerp often equals `linear` with `vlm_weight: 1 − t`.
The angle is computed in float64.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from vlmgraft.methods.base import Method, Number, TensorContext, check_range, number_for
from vlmgraft.methods.task_vectors import per_matrix

if TYPE_CHECKING:
    from torch import Tensor

COLLINEAR = 0.9995
"""|cos θ| above which the mean is taken, as in mergekit."""


@dataclass(frozen=True)
class Slerp(Method):
    """Along the great circle from the VLM to the donor."""

    name: ClassVar[str] = "slerp"
    default_modules: ClassVar[tuple[str, ...]] = ("all",)
    whole_tensors: ClassVar[bool] = True

    t: Number = 0.1
    """How far: 0 is the VLM, 1 the donor."""

    def __post_init__(self) -> None:
        check_range(self, "t", low=0, high=1)

    def apply(self, tensors: Mapping[str, Tensor], context: TensorContext) -> Tensor:
        """The interpolated tensor, a stack matrix by matrix."""
        t = number_for(self.t, context, "t")
        if t == 0:
            return tensors["vlm"]

        def merge(matrices: Mapping[str, Tensor], start: int) -> Tensor:
            vlm, donor = great_circle_weights(matrices["vlm"], matrices["donor"], t)
            return (matrices["vlm"] * vlm).add_(matrices["donor"], alpha=donor)

        return per_matrix(merge, tensors)


def great_circle_weights(vlm: Tensor, donor: Tensor, t: float) -> tuple[float, float]:
    """The weights of both tensors; those of their mean if they are collinear or one is zero."""
    a, b = vlm.double().flatten(), donor.double().flatten()
    norms = float(a.norm() * b.norm())
    cosine = float(a @ b) / norms if norms > 0 else 1.0
    if abs(cosine) > COLLINEAR:
        return 1 - t, t
    angle = math.acos(cosine)
    return math.sin((1 - t) * angle) / math.sin(angle), math.sin(t * angle) / math.sin(angle)
