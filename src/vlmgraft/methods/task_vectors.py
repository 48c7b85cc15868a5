"""Shared parts of the methods on two task vectors: options, the task vectors themselves, and merging by sign.

Each method thins out τ_vlm = W_vlm − W_vlm_base and τ = W_donor − W_base in its own way. They are then weighted and
added to W_vlm_base, directly or after `merge_signs`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, ClassVar, Literal

from vlmgraft.methods.base import Method, Number, Pair, TensorContext, check_range, number_for
from vlmgraft.methods.scratch import scratch

if TYPE_CHECKING:
    from torch import Tensor

Election = Literal["unweighted", "weighted", "frequency", "none"]
Combine = Literal["mean", "weighted_mean", "sum", "max"]
TINY = 1e-8
"""Divisors of smaller magnitude are treated as 1, as in mergekit."""


@dataclass(frozen=True)
class TwoVectorMethod(Method):
    """Base of the methods that thin out both task vectors and add their weighted sum to the VLM's base."""

    needs: ClassVar[frozenset[str]] = frozenset({"donor_base", "vlm_base"})

    density: Number = 0.2
    """Share of the entries of each task vector that is kept, above 0 to 1."""
    weights: Pair = (1.0, 1.0)
    """[VLM, donor]: factors on the two task vectors."""
    scale: Number = 1.0
    """λ, a factor on the merged task vector."""
    donor_density: Number | None = field(default=None, kw_only=True)
    """Share that is kept of the donor's task vector, if different from the VLM's."""

    def __post_init__(self) -> None:
        check_range(self, "density", "donor_density", low=0, high=1, above=True)
        check_range(self, "weights", "scale")

    def density_of(self, source: str, context: TensorContext) -> float:
        """The share that is kept of one task vector, "vlm" or "donor", in one tensor."""
        if source == "donor" and self.donor_density is not None:
            return number_for(self.donor_density, context, "donor_density")
        return number_for(self.density, context, "density")

    def apply(self, tensors: Mapping[str, Tensor], context: TensorContext) -> Tensor:
        """vlm_base + λ·(the thinned task vectors, added or merged by sign); a stack is merged matrix by matrix."""

        def merge(matrices: Mapping[str, Tensor], start: int) -> Tensor:
            piece = replace(context, start=context.start + start)
            vlm, donor = (self.thinned(tau, source, piece) for source, tau in task_vectors(matrices).items())
            return self.merge(vlm, donor, matrices["vlm_base"], context)

        return per_matrix(merge, tensors)

    def thinned(self, tau: Tensor, source: str, context: TensorContext) -> Tensor:
        """δ(τ) of one piece of the "vlm" or "donor" task vector; overwrites it."""
        raise NotImplementedError(f"{self.name}: a merge streams what `prepare` gives back")

    def merge(self, vlm: Tensor, donor: Tensor, base: Tensor, context: TensorContext) -> Tensor:
        """base + λ·(merged task vectors); overwrites the task vectors."""
        weights = number_for(self.weights[0], context, "weights[0]"), number_for(self.weights[1], context, "weights[1]")
        return times(self.combined(vlm, donor, weights), number_for(self.scale, context, "scale")).add_(base)

    def combined(self, vlm: Tensor, donor: Tensor, weights: tuple[float, float]) -> Tensor:
        """The weighted sum of the thinned task vectors, in the memory of the first."""
        return times(vlm, weights[0]).add_(donor, alpha=weights[1])


@dataclass(frozen=True)
class SignMethod(TwoVectorMethod):
    """Base of the methods that elect a sign per entry and merge the entries that agree with it."""

    election: Election = field(default="unweighted", kw_only=True)
    """Sign of the sum of the thinned task vectors, of the weighted ones, or the most frequent; none: both are added."""
    combine: Combine = field(default="mean", kw_only=True)
    """Divisor of the weighted sum: the number of entries that agree, their weights, or none; max: the largest alone."""

    def combined(self, vlm: Tensor, donor: Tensor, weights: tuple[float, float]) -> Tensor:
        """The thinned task vectors, added or merged by sign."""
        if self.election == "none":
            return super().combined(vlm, donor, weights)
        return merge_signs(vlm, donor, weights, self.election, self.combine)


def task_vectors(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """{"vlm": vlm − vlm_base, "donor": donor − donor_base}, in memory from `scratch`."""
    import torch

    vlm, donor = scratch(tensors["vlm"], "vlm", "donor")
    return {
        "vlm": torch.sub(tensors["vlm"], tensors["vlm_base"], out=vlm),
        "donor": torch.sub(tensors["donor"], tensors["donor_base"], out=donor),
    }


def per_matrix(merge: Callable[[Mapping[str, Tensor], int], Tensor], tensors: Mapping[str, Tensor]) -> Tensor:
    """`merge(tensors, first element)` of a tensor, or of every matrix of a stack [experts, out, in], as a stack."""
    import torch

    if tensors["vlm"].ndim != 3:
        return merge(tensors, 0)
    size = tensors["vlm"][0].numel()
    experts = range(len(tensors["vlm"]))
    return torch.stack([merge({key: stack[e] for key, stack in tensors.items()}, e * size) for e in experts])


def merge_signs(
    vlm: Tensor, donor: Tensor, weights: tuple[float, float], election: Election, combine: Combine
) -> Tensor:
    """Elect a sign per entry and merge the entries that have it; float32 tensors of one shape.

    Overwrites `vlm` and `donor`, one of which is the result. All steps are float arithmetic: in torch, booleans cost
    five times as much.
    """
    import torch

    vote, count, donor_count = scratch(vlm, "vote", "count", "donor_count")
    divisors = weights
    if election == "weighted":  # the votes are w·τ, and a negative weight flips the sign of τ
        for tau, weight in zip((vlm, donor), weights, strict=True):
            if weight < 0:
                tau.neg_()
        weights = abs(weights[0]), abs(weights[1])
        torch.mul(vlm, weights[0], out=vote).add_(donor, alpha=weights[1])
    elif election == "frequency":
        torch.sign(vlm, out=vote).add_(torch.sign(donor, out=donor_count))
    else:
        torch.add(vlm, donor, out=vote)
    vote.sign_()
    vlm.mul_(vote).clamp_(min=0)  # the magnitude where the sign is the elected one, else 0
    donor.mul_(vote).clamp_(min=0)
    if combine == "max":
        torch.abs(vlm.mul_(weights[0]), out=count)
        torch.abs(donor.mul_(weights[1]), out=donor_count)
        torch.ge(count, donor_count, out=count)
        return vlm.mul_(count).add_(donor.mul_(count.neg_().add_(1))).mul_(vote)
    if combine == "mean":  # halve the sum where both agree
        torch.minimum(vlm, donor, out=count).sign_()
    elif combine == "weighted_mean":
        torch.sign(vlm, out=count).mul_(divisors[0]).add_(torch.sign(donor, out=donor_count), alpha=divisors[1])
    total = times(vlm, weights[0]).add_(donor, alpha=weights[1])
    if combine == "mean":
        torch.addcmul(total, total, count, value=-0.5, out=total)
    elif combine == "weighted_mean":
        none = torch.lt(torch.abs(count, out=donor_count), TINY, out=donor)
        total.div_(count.add_(none))
    return total.mul_(vote)


def times(values: Tensor, factor: float) -> Tensor:
    """The values times a factor, in place; a factor of 1 skips the pass over memory."""
    return values if factor == 1 else values.mul_(factor)
