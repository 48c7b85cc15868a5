"""DARE (arXiv 2311.03099): entries of both task vectors are dropped at random, then added or merged by sign.

    dare_linear   W = W_vlm_base + λ·(w₁·δ(τ_vlm) + w₂·δ(τ))        τ_vlm = W_vlm − W_vlm_base,  τ = W_donor − W_base
    dare_ties     W = W_vlm_base + λ·merge(δ(τ_vlm), δ(τ))

δ keeps an entry with probability `density` (the paper's 1 − p) and divides it by `density`, so that its expectation
stays; `merge` elects signs and merges as `ties` does, with the same options and defaults. Which entries are kept is a
function of (seed, source, tensor name, entry) alone: every block of 65,536 entries has a random stream of its own
(numpy's SFC64, whose streams are fixed), whatever the order, the number of threads, the chunks or the shards. The
probability is exact to 2⁻³². Where implementations differ:

- a copy of the BR2V code that circulates computes the division and drops the result: `rescale: false` reproduces it.
- mergekit keeps the L1 norm of what it rescales in some versions; the paper and PEFT divide by density.
- the paper draws one mask per run; here a mask is a function of seed, tensor and entry.
- PEFT merges signs as the defaults here do; mergekit elects on the weighted sum (`election: weighted`) and divides by
  nothing (`combine: sum`) unless told to normalize.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from vlmgraft.methods.base import TensorContext
from vlmgraft.methods.draws import draws
from vlmgraft.methods.task_vectors import SignMethod, TwoVectorMethod

if TYPE_CHECKING:
    from torch import Tensor


def keep_mask(seed: int, source: str, context: TensorContext, count: int, density: float) -> Tensor:
    """Which of `count` entries from `context.start` on are kept: bool [count]."""
    import torch

    return torch.from_numpy(draws(seed, source, context, count) < round(density * 2**32))


def drop(tau: Tensor, seed: int, source: str, context: TensorContext, density: float, rescale: bool) -> Tensor:
    """τ with entries dropped and, when `rescale`, the others divided by `density`; τ's own memory where it can be."""
    import numpy as np

    if density >= 1:
        return tau
    tau = tau.contiguous()
    values = tau.view(-1).numpy()
    np.multiply(values, keep_mask(seed, source, context, tau.numel(), density).numpy(), out=values)
    return tau.div_(density) if rescale else tau


@dataclass(frozen=True)
class DareLinear(TwoVectorMethod):
    """Drop at random, add."""

    name: ClassVar[str] = "dare_linear"

    rescale: bool = True
    """Divide what is kept by the density, as the paper does."""
    seed: int = 0
    """Of the random numbers; one seed gives one result."""

    def thinned(self, tau: Tensor, source: str, context: TensorContext) -> Tensor:
        """δ(τ) of one chunk."""
        return drop(tau, self.seed, source, context, self.density_of(source, context), self.rescale)


@dataclass(frozen=True)
class DareTies(SignMethod, DareLinear):
    """Drop at random, then elect signs as `ties` does."""

    name: ClassVar[str] = "dare_ties"
