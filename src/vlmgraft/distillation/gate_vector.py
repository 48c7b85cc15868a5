"""All gates of a model as one trained vector: one logit per direction, per matrix or per layer."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from vlmgraft.errors import RecipeError
from vlmgraft.spectral.factors import Factors
from vlmgraft.spectral.gates import Gates

Granularity = Literal["direction", "matrix", "layer"]

EXTREME = 16.0
"""Initial value of a logit that is given as ±inf: σ(±16) differs from 0 and 1 by 1e-7."""


class GateVector:
    """The trained logits and the constants that turn them into spectra.

    logits [P], float32, requires_grad; P is the number of directions, matrices or layers. One vector, because one
    optimiser step, one sigmoid and one reduction over ranks for all matrices cost less than one for each.
    Fused experts have one logit per expert and direction; with granularity "matrix" they share one.
    """

    def __init__(
        self,
        factors: Mapping[str, Factors],
        granularity: Granularity = "direction",
        start: Gates | float = 0.0,
        device: torch.device | str = "cpu",
    ) -> None:
        if granularity not in get_args(Granularity):
            raise RecipeError(f"granularity: {granularity!r} is none of {', '.join(get_args(Granularity))}")
        self.names: Sequence[str] = list(factors)
        spectra = {name: factors[name].s.float().cpu() for name in self.names}  # a store is read once
        self.shapes = [spectra[name].shape for name in self.names]
        self.sizes = [shape.numel() for shape in self.shapes]
        self.s = torch.cat([spectra[name].flatten() for name in self.names]).to(device)
        self.norm = self.s.square().sum().clamp_min(torch.finfo(torch.float32).tiny)
        self.index = self._index(granularity)
        if isinstance(start, Gates):
            full = torch.cat([start.logits[name].float().flatten() for name in self.names]).clamp(-EXTREME, EXTREME)
        else:
            full = torch.full((len(self.s),), float(start)).clamp(-EXTREME, EXTREME)
        if self.index is not None:
            count = torch.bincount(self.index)
            full = torch.zeros(len(count)).index_add(0, self.index, full) / count
            self.index = self.index.to(device)
        self.logits = full.to(device).requires_grad_()

    def _index(self, granularity: Granularity) -> Tensor | None:
        """Index of each direction's logit; None when every direction has its own."""
        if granularity == "direction":
            return None
        if granularity == "matrix":
            keys: list[str] = list(self.names)
        else:
            layers = [re.search(r"layers\.(\d+)\.", name) for name in self.names]
            keys = [layer.group(1) if layer else name for layer, name in zip(layers, self.names, strict=True)]
        numbers = {key: number for number, key in enumerate(dict.fromkeys(keys))}
        return torch.repeat_interleave(torch.tensor([numbers[key] for key in keys]), torch.tensor(self.sizes))

    def expanded(self) -> Float[Tensor, " directions"]:
        """One logit per direction."""
        return self.logits if self.index is None else self.logits[self.index]

    def spectra(self, scale: float) -> tuple[dict[str, Float[Tensor, " r"]], Float[Tensor, ""]]:
        """λ σ(g) ⊙ s per tensor, and the share of injected energy Σ‖σ(g) ⊙ s‖² / Σ‖s‖², both differentiable."""
        spectrum = self.expanded().sigmoid() * self.s
        return self._by_name(scale * spectrum), spectrum.square().sum() / self.norm

    def opened(self) -> Float[Tensor, " directions"]:
        """σ(g) per direction, detached."""
        return self.expanded().detach().sigmoid()

    def frozen(self) -> dict[str, Float[Tensor, " r"]]:
        """The logits per tensor as independent float32 tensors on the CPU."""
        parts = self._by_name(self.expanded().detach().float().cpu())
        return {name: part.clone() for name, part in parts.items()}

    def _by_name(self, flat: Tensor) -> dict[str, Tensor]:
        parts = zip(self.names, flat.split(self.sizes), self.shapes, strict=True)
        return {name: part.view(shape) for name, part, shape in parts}
