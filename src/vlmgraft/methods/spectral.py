"""Task vector with another spectrum: W = W_vlm + a·(W_base − W_vlm) + λ·U diag(f(s)) Vh with
τ = W_donor − W_base = U diag(s) Vh.

| rule     | f(s)                                                                      | source                   |
|----------|---------------------------------------------------------------------------|--------------------------|
| truncate | s_i for i ≤ k, else 0                                                     | Eckart and Young 1936    |
| rank_k   | s_i·‖s‖₂/‖s_{≤k}‖₂ for i ≤ k: keeps the Frobenius norm; k = 1: ‖τ‖_F u₁v₁ᵀ | arXiv 2610.08659         |
| star     | s_i·Σs/Σ_{i≤k}s for i ≤ k: keeps the nuclear norm; k by the share η of it | STAR, arXiv 2502.10339   |
| iso      | mean of s, everywhere                                                     | Iso-C, arXiv 2502.04959  |
| sar      | none: U_k U_kᵀ τ V_k V_kᵀ, U_k and V_k the first k of *W_base*'s SVD      | SAR, arXiv 2607.03065    |

`interpolation` a moves the VLM towards the donor's base, with any rule; 0, the default, leaves that term out. rank_k
with k = 1 and a = λ is the donor interpolation of arXiv 2610.08659 (unreviewed; k = 1 and a = λ = 0.05 are best in its
table): (1 − λ)·W_vlm + λ·W_donor with another spectrum of τ. SAR's k is small, by default 1 % of the directions.
AdaRank (arXiv 2503.22178), whose f is a binary mask trained on test inputs, is in experiments/lab/adarank.py.

Every matrix is decomposed by itself, as stored: InternLM2's fused wqkv and fused gate and up projections each count as
one matrix, a stack of experts [experts, out, in] as one matrix per expert. With f(s) = s this is task arithmetic; with
f(s) = σ(g) ⊙ s it is FRISM. The rules are pure functions of s, float32 [r] in descending order; their result has as
many entries, zeros where a direction is closed. Sums are float64. STAR's authors use η = 0.4 and Iso-C sums the task
vectors of several models first; here there is one donor.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from vlmgraft.errors import RecipeError
from vlmgraft.methods.base import Method, Number, TensorContext, check_range, number_for
from vlmgraft.spectral.rank import Rank, check_matrix, check_rank, directions_kept

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor

RANKED = ("truncate", "rank_k", "sar")
SAR_SHARE = 0.01


@dataclass(frozen=True)
class Spectral(Method):
    """The rules are in the table above; a scale of 0 is the VLM bit for bit."""

    name: ClassVar[str] = "spectral"
    needs: ClassVar[frozenset[str]] = frozenset({"donor_base"})
    whole_tensors: ClassVar[bool] = True
    matrices_only: ClassVar[bool] = True

    rule: Literal["truncate", "rank_k", "star", "iso", "sar"] = "truncate"
    """Which spectrum f(s) takes the place of s."""
    rank: Literal["full"] | int | dict[Literal["energy"], float] | None = None
    """For truncate, rank_k and sar: directions, {energy: share} or full; default {energy: 0.9} (our choice), 1, 1 %."""
    eta: float = 0.4
    """For star: share of the nuclear norm that is kept, above 0 to 1."""
    scale: Number = 1.0
    """λ, a factor on the update; 0 is the VLM, moved by interpolation if that is set."""
    interpolation: Number = 0.0
    """a, how far the VLM is moved towards the donor's base, in addition to the update."""

    def __post_init__(self) -> None:
        check_range(self, "scale", "interpolation")
        if self.rank is not None and self.rule not in RANKED:
            raise RecipeError(
                f"method.rank: rule {self.rule} has none; remove it" + (" and set eta" * (self.rule == "star"))
            )
        if self.rank is not None:
            check_rank(self.rank, "method.rank")
        if not 0 < self.eta <= 1:
            raise RecipeError(f"method.eta: {self.eta} must be above 0 and at most 1")

    def apply(self, tensors: Mapping[str, Tensor], context: TensorContext) -> Tensor:
        """vlm + a·(base − vlm) + λ·U diag(f(s)) Vh of a matrix or a stack; raises NumericalError when not finite."""
        import torch

        vlm, base = tensors["vlm"], tensors["donor_base"]
        check_matrix(context.name, vlm.shape)
        scale = number_for(self.scale, context, "scale")
        share = number_for(self.interpolation, context, "interpolation")
        tau = tensors["donor"] - base
        merged = vlm
        if scale != 0 and bool(tau.any()):
            merged = torch.empty_like(vlm)
            for index in range(len(tau)) if tau.ndim == 3 else (...,):
                name = context.name if tau.ndim == 2 else f"{context.name}[{index}]"
                torch.add(vlm[index], self.update(tau[index], base[index], name), alpha=scale, out=merged[index])
        return merged if share == 0 else torch.add(merged, base - vlm, alpha=share)

    def update(self, tau: Float[Tensor, "out in"], base: Float[Tensor, "out in"], name: str) -> Float[Tensor, "out in"]:
        """U diag(f(s)) Vh of one task vector, or its projection; only the directions that f needs are computed."""
        from vlmgraft.spectral.svd import decompose_matrix

        if self.rule == "sar":
            rank: Rank = self.rank or math.ceil(SAR_SHARE * min(base.shape))  # type: ignore[assignment]
            frame = decompose_matrix(base, rank, name=f"{name} of the base")
            return frame.U @ (frame.U.mT @ tau @ frame.Vh.mT) @ frame.Vh
        if self.rule == "truncate" and self.rank == "full":
            return tau
        svd = decompose_matrix(tau, self._rank, name=name)
        spectrum = self.spectrum(svd.s, svd.energy, "full")
        kept = int((spectrum != 0).sum())
        return (svd.U[:, :kept] * spectrum[:kept]) @ svd.Vh[:kept]

    def spectrum(self, s: Float[Tensor, " r"], energy: float, rank: Rank | None = None) -> Float[Tensor, " r"]:
        """f(s) of the rules that have one. energy: Σ s² of all singular values. rank: "full" if s is truncated."""
        if self.rule == "truncate":
            return truncate(s, rank or self._rank)
        if self.rule == "rank_k":
            return rank_k(s, rank or self._rank, energy=energy)
        return star(s, self.eta) if self.rule == "star" else iso(s)

    @property
    def diagonal(self) -> bool:
        """Whether W_vlm and the factors of τ are sufficient: for a rule with a spectrum, without interpolation."""
        return self.rule != "sar" and self.interpolation == 0

    @property
    def _rank(self) -> Rank:
        """The rank that τ is cut to."""
        if self.rule not in RANKED:
            return "full"
        return self.rank or ({"energy": 0.9} if self.rule == "truncate" else 1)  # type: ignore[return-value]


def truncate(s: Float[Tensor, " r"], rank: Rank) -> Float[Tensor, " r"]:
    """s_i for i ≤ k, else 0. rank: k, "full", or {"energy": η} for the smallest k with Σ_{i≤k} s² ≥ η Σ s²."""
    check_rank(rank)
    return _first(s, directions_kept(s, rank))


def rank_k(s: Float[Tensor, " r"], rank: Rank = 1, *, energy: float | None = None) -> Float[Tensor, " r"]:
    """s_i·‖s‖₂/‖s_{≤k}‖₂ for i ≤ k, else 0: the first k, rescaled to the norm ‖s‖₂ of all of s (arXiv 2610.08659).

    energy: Σ s² of the whole spectrum when `s` holds only its largest values.
    """
    kept = truncate(s, rank)
    total = s.double().square().sum() if energy is None else s.new_tensor(energy).double()
    kept_energy = kept.double().square().sum()
    return kept if float(kept_energy) == 0 else kept * float((total / kept_energy).sqrt())


def star(s: Float[Tensor, " r"], eta: float) -> Float[Tensor, " r"]:
    """STAR (arXiv 2502.10339): the smallest k with Σ_{i≤k} s ≥ η Σ s, rescaled to the old nuclear norm Σ s."""
    cumulative = s.double().cumsum(0)
    if eta >= 1 or not float(cumulative[-1]) > 0:
        return s.clone()
    count = int((cumulative < eta * cumulative[-1]).sum()) + 1
    return (_first(s, count).double() * (cumulative[-1] / cumulative[count - 1])).to(s.dtype)


def iso(s: Float[Tensor, " r"]) -> Float[Tensor, " r"]:
    """Iso-C (arXiv 2502.04959): the mean of s everywhere. Made for sums of many task vectors; with one donor it is a
    negative control."""
    return s.new_full(s.shape, float(s.double().mean()))


def _first(s: Tensor, count: int) -> Tensor:
    kept = s.clone()
    kept[count:] = 0
    return kept
