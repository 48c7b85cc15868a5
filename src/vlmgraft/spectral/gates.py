"""Gates on singular directions, the result of FRISM's second stage."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from vlmgraft.errors import CheckpointError

HISTOGRAM_BINS = 10


@dataclass(frozen=True)
class Gates:
    """Gate logits g per tensor; W(g) = W_vlm + λ U diag(σ(g) ⊙ s) Vh.

    logits: float32 on the CPU, one per kept singular direction, [experts, r] for fused experts. scale: λ. settings: how
    they were learned. log: rows of the training log. factors: digest of the factor store they belong to, if it has one.
    """

    logits: Mapping[str, Float[Tensor, " r"]]
    scale: float
    settings: Mapping[str, Any] = field(default_factory=dict)
    log: tuple[Mapping[str, Any], ...] = ()
    factors: str | None = None

    def open(self, name: str) -> Float[Tensor, " r"]:
        """σ(g): how far each direction is open, 0 to 1."""
        return self.logits[name].sigmoid()

    def spectrum(self, name: str, s: Float[Tensor, " r"]) -> Float[Tensor, " r"]:
        """λ σ(g) ⊙ s in float32, on the device of s; raises CheckpointError when the lengths differ."""
        if self.logits[name].shape != s.shape:
            raise CheckpointError(
                f"{name}: {len(self.logits[name])} gates for {len(s)} directions; these gates belong to other factors"
            )
        return self.scale * self.open(name).to(s.device) * s.float()


def injected_energy(gates: Gates, spectra: Mapping[str, Float[Tensor, " r"]]) -> float:
    """Σ‖σ(g) ⊙ s‖² / Σ‖s‖² over all tensors, 0 for a zero task vector; spectra: s by tensor, on the CPU."""
    injected = sum(float((gates.open(name) * s).square().sum()) for name, s in spectra.items())
    return injected / max(sum(float(s.square().sum()) for s in spectra.values()), 1e-30)


def constant_gates(sizes: Mapping[str, int | tuple[int, ...]], logit: float, scale: float) -> Gates:
    """The same logit everywhere: 0 is task arithmetic at λ/2, +inf at λ, −inf the VLM itself."""
    shapes = {name: (size,) if isinstance(size, int) else tuple(size) for name, size in sizes.items()}
    return Gates({name: torch.full(shape, logit) for name, shape in shapes.items()}, scale)


def histogram(opened: Float[Tensor, " n"]) -> list[float]:
    """Shares of the gates in ten equal bins, from closed to open."""
    counts = torch.histc(opened.detach().float().cpu(), bins=HISTOGRAM_BINS, min=0, max=1)
    return [round(float(count) / max(1, opened.numel()), 4) for count in counts]
