"""DARE (arXiv 2311.03099): entries of both task vectors are dropped at random, then added or merged by sign.

    dare_linear   W = W_vlm_base + λ·(w₁·δ(τ_vlm) + w₂·δ(τ))        τ_vlm = W_vlm − W_vlm_base,  τ = W_donor − W_base
    dare_ties     W = W_vlm_base + λ·merge(δ(τ_vlm), δ(τ))

δ keeps an entry with probability `density` (the paper's 1 − p) and divides it by `density`, so that its expectation is
unchanged; `merge` elects signs and merges as in `ties`, with the same options and defaults. Which entries are kept
depends only on (seed, source, tensor name, entry): every block of 65,536 entries has its own random stream (numpy's
SFC64, whose streams are fixed), independent of order, number of threads, chunks and shards. The probability is exact
to 2⁻³². Where implementations differ:

- a circulating copy of the BR2V code computes the division and discards the result: `rescale: false` reproduces it.
- some versions of mergekit rescale to the old L1 norm; the paper and PEFT divide by density.
- the paper draws one mask per run; here a mask is a function of seed, tensor and entry.
- PEFT merges signs like the defaults here; mergekit elects on the weighted sum (`election: weighted`) and does not
  divide (`combine: sum`) unless `normalize` is set.
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
    """τ with entries dropped and, with `rescale`, the others divided by `density`; in τ's own memory if possible."""
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
    """Divide the kept entries by the density, as in the paper."""
    seed: int = 0
    """Seed of the random numbers; equal seeds give equal results."""

    def thinned(self, tau: Tensor, source: str, context: TensorContext) -> Tensor:
        """δ(τ) of one chunk."""
        return drop(tau, self.seed, source, context, self.density_of(source, context), self.rescale)


@dataclass(frozen=True)
class DareTies(SignMethod, DareLinear):
    """Drop at random, then elect signs as `ties` does."""

    name: ClassVar[str] = "dare_ties"
