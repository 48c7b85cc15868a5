"""Task vector with another spectrum: W = W_vlm + λ·U diag(f(s)) Vh with τ = W_donor − W_base = U diag(s) Vh.

| rule     | f(s)                                                   | source                                        |
|----------|--------------------------------------------------------|-----------------------------------------------|
| truncate | s_i for i ≤ k, else 0                                  | Eckart and Young 1936                         |
| rank_one | ‖s‖₂/√k for i ≤ k, else 0: keeps the Frobenius norm    | Selective-RL 2026, k = 1 (unreviewed, a lead) |
| star     | s_i·Σs/Σ_{i≤k}s for i ≤ k: keeps the nuclear norm; k by the share η of it | STAR, arXiv 2502.10339     |
| iso      | mean of s, everywhere                                  | Iso-C, arXiv 2502.04959                       |

Every matrix is decomposed by itself, as it is stored: InternLM2's fused wqkv and fused gate and up projections count as
one matrix. A stack of experts [experts, out, in] is a matrix per expert. The rules are in `spectral/rules.py`.
STAR's authors use η = 0.4 and Iso-C sums the task vectors of several models first; here there is one donor.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from vlmgraft.errors import RecipeError
from vlmgraft.methods.base import DEFAULT_MODULES, Number, TensorContext, check_matrix, check_range, number_for

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor

    from vlmgraft.spectral.svd import Rank

RULE_RANKS: dict[str, Any] = {
    "truncate": {"energy": 0.9},
    "rank_one": 1,
}


@dataclass(frozen=True)
class Spectral:
    """The rules are in the table above; a scale of 0 is the VLM bit for bit."""

    name: ClassVar[str] = "spectral"
    needs: ClassVar[frozenset[str]] = frozenset({"donor_base"})
    default_modules: ClassVar[tuple[str, ...]] = DEFAULT_MODULES
    granularity: ClassVar[Literal["element", "tensor"]] = "tensor"
    matrices_only: ClassVar[bool] = True

    rule: Literal["truncate", "rank_one", "star", "iso"] = "truncate"
    """Which spectrum f(s) takes the place of s."""
    rank: Literal["full"] | int | dict[Literal["energy"], float] | None = None
    """Of truncate and rank_one: directions, {energy: share} or full; default {energy: 0.9} (our choice) and 1."""
    eta: float = 0.4
    """Of star: share of the nuclear norm that is kept, above 0 to 1."""
    scale: Number = 1.0
    """λ, a factor on what is added; 0 is the VLM."""

    def __post_init__(self) -> None:
        check_range(self, "scale", -float("inf"))
        if self.rank is not None and self.rule not in RULE_RANKS:
            raise RecipeError(
                f"method.rank: rule {self.rule} has none; remove it" + (" and set eta" * (self.rule == "star"))
            )
        bad = isinstance(self.rank, int) and self.rank < 1
        if bad or (isinstance(self.rank, dict) and not 0 < self.rank.get("energy", 0) <= 1):
            raise RecipeError(
                f'method.rank: {self.rank!r} is not "full", a positive integer or {{energy: share}} up to 1'
            )
        if not 0 < self.eta <= 1:
            raise RecipeError(f"method.eta: {self.eta} must be above 0 and at most 1")

    def combine(self, tensors: Mapping[str, Tensor], context: TensorContext) -> Tensor:
        """vlm + λ·U diag(f(s)) Vh of one matrix or a stack; raises NumericalError when one is not finite."""
        import torch

        scale, vlm = number_for(self.scale, context, "scale"), tensors["vlm"]
        check_matrix(context.name, tuple(vlm.shape))
        tau = tensors["donor"] - tensors["donor_base"]
        if scale == 0 or not bool(tau.any()):
            return vlm
        if tau.ndim == 2:
            return vlm.add(self.update(tau, context.name), alpha=scale)
        merged = torch.empty_like(vlm)
        for place, expert in enumerate(tau):
            torch.add(vlm[place], self.update(expert, f"{context.name}[{place}]"), alpha=scale, out=merged[place])
        return merged

    def update(self, tau: Float[Tensor, "out in"], name: str) -> Float[Tensor, "out in"]:
        """U diag(f(s)) Vh of one task vector; only the directions that f needs are computed."""
        from vlmgraft.spectral import rules
        from vlmgraft.spectral.svd import decompose_matrix

        rank: Rank = RULE_RANKS.get(self.rule, "full") if self.rank is None else self.rank  # type: ignore[assignment]
        if self.rule == "truncate" and rank == "full":
            return tau
        svd = decompose_matrix(tau, rank, name=name)
        spectrum = {
            "truncate": lambda: svd.s,
            "rank_one": lambda: rules.rank_one(svd.s, "full", energy=svd.energy),
            "star": lambda: rules.star(svd.s, self.eta),
            "iso": lambda: rules.iso(svd.s),
        }[self.rule]()
        kept = int((spectrum != 0).sum())
        return (svd.U[:, :kept] * spectrum[:kept]) @ svd.Vh[:kept]
