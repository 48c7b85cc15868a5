"""Task arithmetic (arXiv 2212.04089): W = W_vlm + λ·(W_donor − W_base), float32, as `torch.add(alpha=λ)` rounds it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from vlmgraft.methods.base import Fused, Method, Number, TensorContext, check_range, number_for
from vlmgraft.methods.scratch import scratch

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class TaskArithmetic(Method):
    """The plain sum; a scale of 0 is the VLM bit for bit."""

    name: ClassVar[str] = "task_arithmetic"
    needs: ClassVar[frozenset[str]] = frozenset({"donor_base"})

    scale: Number = 1.0
    """λ, a factor on the task vector."""

    def __post_init__(self) -> None:
        check_range(self, "scale")

    def apply(self, tensors: Mapping[str, Tensor], context: TensorContext) -> Tensor:
        """vlm + λ·(donor − donor_base)."""
        scale = number_for(self.scale, context, "scale")
        if scale == 0:
            return tensors["vlm"]
        import torch

        (merged,) = scratch(tensors["vlm"], "merged")
        torch.sub(tensors["donor"], tensors["donor_base"], out=merged)
        return torch.add(tensors["vlm"], merged, alpha=scale, out=merged)

    def fused(self, context: TensorContext) -> Fused | None:
        """`apply` as a form of the compiled pass."""
        scale = number_for(self.scale, context, "scale")
        return Fused("add", (scale,)) if scale else None
