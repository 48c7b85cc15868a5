"""Weighted mean of VLM and donor (BR2V, arXiv 2505.05464): W = a·W_vlm + (1 − a)·W_donor, released runs a = 0.9.

Computed as W_donor + a·(W_vlm − W_donor) in float32 by `torch.lerp`; a = 1 is the VLM bit for bit.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from vlmgraft.methods.base import Number, TensorContext, check_range, number_for
from vlmgraft.methods.scratch import scratch

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Linear:
    """Every tensor of the language model but embeddings and head; needs no base."""

    name: ClassVar[str] = "linear"
    needs: ClassVar[frozenset[str]] = frozenset()
    default_modules: ClassVar[tuple[str, ...]] = ("all",)
    granularity: ClassVar[Literal["element", "tensor"]] = "element"

    vlm_weight: Number = 0.9
    """a, the VLM's share of the mean, 0 to 1."""

    def __post_init__(self) -> None:
        check_range(self, "vlm_weight", -float("inf"))

    def combine(self, tensors: Mapping[str, Tensor], context: TensorContext) -> Tensor:
        """a·vlm + (1 − a)·donor."""
        weight = number_for(self.vlm_weight, context, "vlm_weight")
        if weight == 1:
            return tensors["vlm"]
        import torch

        (merged,) = scratch(tensors["vlm"], "merged")
        return torch.lerp(tensors["donor"], tensors["vlm"], weight, out=merged)
