"""Factors of a task vector, one object per matrix."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from vlmgraft.spectral.svd import Rank, decompose_matrix


@dataclass(frozen=True)
class Factors:
    """τ ≈ U diag(s) Vh for one VLM tensor.

    name: the VLM's tensor name on disk. role: its canonical name inside the text model ("layers.3.mlp.up_proj.weight").
    energy: ‖τ‖_F², also of what a truncation dropped. error: relative residual found by random probes.
    """

    name: str
    role: str
    U: Float[Tensor, "out r"]
    s: Float[Tensor, " r"]
    Vh: Float[Tensor, "r in"]
    energy: float
    error: float

    @property
    def shape(self) -> tuple[int, int]:
        """Shape of τ."""
        return self.U.shape[0], self.Vh.shape[1]

    def update(self, spectrum: Float[Tensor, " r"] | None = None) -> Float[Tensor, "out in"]:
        """U diag(spectrum) Vh in float32; with the factors' own spectrum it is τ, up to truncation."""
        spectrum = self.s if spectrum is None else spectrum
        return (self.U.float() * spectrum.float()) @ self.Vh.float()

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Factors:
        """The same factors elsewhere: `dtype` applies to U and Vh only, singular values stay float32."""
        return replace(self, U=self.U.to(device, dtype), s=self.s.to(device), Vh=self.Vh.to(device, dtype))

    def shuffled(self, seed: int) -> Factors:
        """Negative control: the same spectrum on the same singular vectors, wrongly paired (Vh's rows permuted)."""
        order = torch.randperm(len(self.s), generator=torch.Generator().manual_seed(seed))
        return replace(self, Vh=self.Vh[order.to(self.Vh.device)])


def factorize(tau: Float[Tensor, "out in"], name: str, role: str, rank: Rank = "full") -> Factors:
    """Decompose one task-vector matrix; raises NumericalError naming the tensor."""
    result = decompose_matrix(tau, rank, name=name)
    return Factors(name, role, result.U, result.s, result.Vh, result.energy, result.error)
