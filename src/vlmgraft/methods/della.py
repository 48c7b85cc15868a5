"""DELLA (arXiv 2406.11617): like DARE, but the larger an entry is within its row, the more likely it is kept.

    W    = W_vlm_base + λ·merge(δ(τ_vlm), δ(τ))        τ_vlm = W_vlm − W_vlm_base,  τ = W_donor − W_base
    p_ij = density − ε + 2ε·(r_ij − 1)/(n − 1)         r_ij: rank of |τ_ij| among the n entries of row i, 1 the smallest

δ keeps an entry with probability p_ij (density ± ε as in mergekit; the paper's ε is the whole width, and it gives the
probability of dropping). `rescale` then divides the entry by p_ij, which preserves its expectation (the paper's rule),
or restores the old L1 norm of the whole tensor (mergekit's rule), or does neither. ε = 0 gives DARE, with the same
entries for the same seed: the random numbers are DARE's, a function of seed, source, tensor and entry. `merge` elects
signs as in `ties`; with `election: none` both are added, which is mergekit's `della_linear`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from vlmgraft.errors import RecipeError
from vlmgraft.methods.base import Number, TensorContext, check_range, number_for
from vlmgraft.methods.draws import draws
from vlmgraft.methods.task_vectors import SignMethod

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Della(SignMethod):
    """Drop at random by rank, then elect signs."""

    name: ClassVar[str] = "della"
    whole_tensors: ClassVar[bool] = True

    epsilon: Number = 0.15
    """ε, how far the probability of the smallest and the largest entry of a row lies from the density."""
    rescale: Literal["probability", "l1", "none"] = "probability"
    """Divide kept entries by their probability, restore the tensor's L1 norm, or neither."""
    seed: int = 0
    """Seed of the random numbers; equal seeds give equal results."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range(self, "epsilon", low=0, high=0.5)

    def thinned(self, tau: Tensor, source: str, context: TensorContext) -> Tensor:
        """δ(τ) of one matrix or vector; raises RecipeError where a probability would not lie in (0, 1]."""
        import torch

        density, epsilon = self.density_of(source, context), number_for(self.epsilon, context, "epsilon")
        if density >= 1:
            return tau
        if not epsilon < density or density + epsilon > 1:
            raise RecipeError(
                f"method.epsilon: {epsilon} around a density of {density} leaves 0 to 1 ({context.name}); lower it"
            )
        chances = keep_probabilities(tau, density, epsilon)
        uniform = torch.from_numpy(draws(self.seed, source, context, tau.numel()).astype("int64")).view(tau.shape)
        kept = tau * (uniform < (chances.double() * 2**32).round().long())
        if self.rescale == "probability":
            return kept.div_(chances)
        if self.rescale == "l1" and (norm := float(kept.abs().sum(dtype=torch.float64))) > 0:
            return kept.mul_(float(tau.abs().sum(dtype=torch.float64)) / norm)
        return kept


def keep_probabilities(tau: Tensor, density: float, epsilon: float) -> Tensor:
    """p_ij, float32 in the shape of τ, [out, in] or [n]; entries of equal magnitude are ranked by position."""
    import torch

    ranks = tau.abs().argsort(dim=-1, stable=True).argsort(dim=-1)
    return ranks.to(torch.float32).mul_(2 * epsilon / max(1, tau.shape[-1] - 1)).add_(density - epsilon)
