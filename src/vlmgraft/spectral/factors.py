"""Factors of a task vector: one object per matrix, kept instead of the matrix itself."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from vlmgraft.errors import CheckpointError
from vlmgraft.spectral.rank import Rank
from vlmgraft.spectral.svd import decompose_matrix
from vlmgraft.spectral.svd_stack import decompose_stack


@dataclass(frozen=True)
class Factors:
    """τ ≈ U diag(s) Vh for one VLM tensor: a matrix, or fused experts with a leading dimension [experts] everywhere.

    name: the VLM's tensor name on disk. role: its canonical name inside the text model ("layers.3.mlp.up_proj.weight").
    energy: ‖τ‖_F², including truncated directions. error: relative residual from random probes, the largest one over
    the experts. route: the algorithm that computed the factors (see svd.py), for information only.
    """

    name: str
    role: str
    U: Float[Tensor, "*experts out r"]
    s: Float[Tensor, "*experts r"]
    Vh: Float[Tensor, "*experts r in"]
    energy: float
    error: float
    route: str = ""

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of τ."""
        return (*self.U.shape[:-1], self.Vh.shape[-1])

    def update(self, spectrum: Float[Tensor, "*experts r"] | None = None) -> Float[Tensor, "*experts out in"]:
        """U diag(spectrum) Vh in float32; with the factors' own spectrum it is τ, up to truncation."""
        spectrum = self.s if spectrum is None else spectrum
        return (self.U.float() * spectrum.float().unsqueeze(-2)) @ self.Vh.float()

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Factors:
        """The same factors on another device; `dtype` applies to U and Vh only, singular values stay float32."""
        return replace(self, U=self.U.to(device, dtype), s=self.s.to(device), Vh=self.Vh.to(device, dtype))

    def shuffled(self, seed: int) -> Factors:
        """Negative control: the same spectrum on the same singular vectors, wrongly paired (Vh's rows permuted)."""
        order = torch.randperm(self.s.shape[-1], generator=torch.Generator().manual_seed(seed))
        return replace(self, Vh=self.Vh.index_select(-2, order.to(self.Vh.device)))


def factorize(tau: Float[Tensor, "*experts out in"], name: str, role: str, rank: Rank = "full") -> Factors:
    """Decompose one task vector, a matrix or fused experts; raises NumericalError naming the tensor."""
    result = (decompose_stack if tau.ndim == 3 else decompose_matrix)(tau, rank, name=name)
    return Factors(name, role, result.U, result.s, result.Vh, result.energy, result.error, result.route)


def join_donors(donors: Sequence[Mapping[str, Factors]]) -> dict[str, Factors]:
    """Factors of several donors, concatenated: U = [U₁ U₂ …], s and Vh likewise, for every tensor that any donor has.

    Every direction of every donor gets its own gate, and one training with one budget learns all gates. The joint U and
    Vh are not orthogonal: gates do not need that, but a LoRA of smaller rank is no longer the best approximation.
    """
    joined = {}
    for name in dict.fromkeys(name for donor in donors for name in donor):
        parts = [donor[name] for donor in donors if name in donor]
        shapes = {part.shape for part in parts}
        if len(shapes) > 1:
            raise CheckpointError(f"{name}: the donors' factors have shapes {sorted(shapes)}; they must be equal")
        joined[name] = Factors(
            name,
            parts[0].role,
            torch.cat([part.U for part in parts], dim=-1),
            torch.cat([part.s for part in parts], dim=-1),
            torch.cat([part.Vh for part in parts], dim=-2),
            sum(part.energy for part in parts),
            max(part.error for part in parts),
        )
    return joined
