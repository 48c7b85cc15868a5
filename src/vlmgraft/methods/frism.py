"""FRISM: the donor's task vector with one learned gate per singular direction (arXiv 2601.21187).

    W = W_vlm + λ U diag(σ(g) ⊙ s) Vh

The dataclass holds the recipe; the gates are learned elsewhere (distillation/distill.py) from factors that are computed
once (spectral/decompose.py). `fold` is the last step: it gives a plain float32 matrix, before the cast to the file's
dtype. `GatedFold` is the method that a merge runs once factors and gates exist.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from vlmgraft.errors import CheckpointError, RecipeError
from vlmgraft.methods.base import Method, TensorContext
from vlmgraft.methods.calibration import Calibration
from vlmgraft.spectral.rank import check_rank
from vlmgraft.storage.urls import check_url

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor

    from vlmgraft.spectral.factors import Factors
    from vlmgraft.spectral.gates import Gates


MEMORY_REMEDY = "lower method.calibration.batch_size, method.calibration.max_new_tokens or method.rank"
"""Advice when learning gates runs out of memory."""


DEFAULT_RANK = 128
"""Default number of directions per matrix. On the lab's small models these are all; on a larger pair 16 of 576 carried
both the merged skill and the damage (docs/measured.md)."""


WHOLE = 0.9995
"""Share of ‖τ‖² above which a truncation is not noted."""


def check_budget(kl_budget: float, option: str = "kl_budget") -> None:
    """Raise RecipeError unless a budget, nats per token, is above 0."""
    if not kl_budget > 0:
        raise RecipeError(f"{option}: {kl_budget} must be above 0; a zero budget is the VLM itself")


class GatedMethod(Method):
    """Base of the methods that merge with factors and gates, which are first made from this recipe."""

    whole_tensors: ClassVar[bool] = True

    scale: float
    kl_budget: float | None
    rank: Any
    seed: int
    calibration: Calibration
    offload: Literal["auto"] | bool
    gradient_checkpointing: Literal["auto"] | bool
    start: str = "half"
    donor_tokens: int | None = None

    def __post_init__(self) -> None:
        check_rank(self.rank, "method.rank")
        if self.kl_budget is not None:
            check_budget(self.kl_budget, "method.kl_budget")
            if self.calibration.held_out == 0:
                raise RecipeError("method.kl_budget is measured on held-out prompts; set method.calibration.held_out")

    @property
    def donor_length(self) -> int:
        """Maximum length of a donor's answer, tokens."""
        return self.donor_tokens or self.calibration.max_new_tokens

    def bind(self, factors: Mapping[str, Factors], gates: Gates, device: str = "cpu") -> GatedFold:
        """The method that a merge runs with these factors and gates; device: where it folds."""
        return GatedFold(factors, gates, device)


@dataclass(frozen=True)
class BudgetGuarantee:
    """A bound on the KL on unseen prompts: gates are scaled back until the bound is within kl_budget."""

    kind: Literal["confidence", "expectation"] = "confidence"
    """The bound holds with probability `level`, or on average over calibration sets."""
    level: float = 0.9
    """Confidence level: above 0, below 1."""
    prompts: int = 256
    """Further questions of the calibration file, which are used for nothing else."""
    cap: float | None = None
    """Maximum that the KL of one prompt counts as, nats per token; default 10 times kl_budget (our choice)."""

    def __post_init__(self) -> None:
        if not 0 < self.level < 1:
            raise RecipeError(f"method.budget_guarantee.level: {self.level} must be above 0 and below 1")
        if self.prompts < 1:
            raise RecipeError(f"method.budget_guarantee.prompts: {self.prompts} must be at least 1")
        if self.cap is not None and not 0 < self.cap < math.inf:
            raise RecipeError(f"method.budget_guarantee.cap: {self.cap} must be above 0 and finite")


@dataclass(frozen=True)
class Frism(GatedMethod):
    """The recipe of gates and of the merge with them."""

    name: ClassVar[str] = "frism"
    needs: ClassVar[frozenset[str]] = frozenset({"donor_base"})

    scale: float = 1.0
    """λ, a factor on the gated task vector."""
    inject: Literal["energy", "donor"] = "energy"
    """The term that opens gates: `energy` is the published one, `donor` matches the donor's answers."""
    inject_weight: float | None = None
    """α, the weight of that term; excludes kl_budget; default 0.1 for energy, 1 for donor."""
    kl_budget: float | None = None
    """Allowed KL from the VLM, nats per token; α is adjusted to it."""
    budget_guarantee: BudgetGuarantee | None = None
    """Keep the KL on unseen prompts of the calibration file's kind within kl_budget, too."""
    questions: str | list[str] | None = None
    """For inject: donor, a file of text questions, or one file per donor."""
    donor_endpoint: str | list[str] | None = None
    """Address of a server that answers `questions` in the donor's place, or one per donor."""
    donor_tokens: int | None = None
    """Maximum length of the donor's answers, tokens; default calibration.max_new_tokens."""
    rank: Literal["full"] | int | dict[Literal["energy"], float] = DEFAULT_RANK
    """Directions per matrix: a number (our choice), full as in the paper, or {energy: share}."""
    granularity: Literal["direction", "matrix", "layer"] = "direction"
    """One gate per singular direction, per matrix or per layer."""
    start: Literal["half", "curvature"] = "half"
    """Gates start half open, or (with a kl_budget) as set by the curvature on the calibration set at the budget;
    several processes then hold whole weights."""
    steps: int = 200
    """Training steps."""
    learning_rate: float = 0.05
    """Of Adam, on the gates' logits."""
    batches_per_step: int = 1
    """Batches averaged for one step: as many as there are GPUs, or a multiple."""
    gradient_checkpointing: Literal["auto"] | bool = "auto"
    """Less memory, more time, the same gates; auto: if the training would not fit otherwise."""
    offload: Literal["auto"] | bool = "auto"
    """Keep layers in host memory: more time, the same gates; auto: if they would not fit on the GPU otherwise."""
    seed: int = 0
    """Seed of the order of batches."""
    calibration: Calibration = field(default_factory=lambda: Calibration("calibration.jsonl"))
    """The image questions on which the VLM's answers are preserved."""

    def __post_init__(self) -> None:
        if self.inject_weight is not None and self.kl_budget is not None:
            raise RecipeError("method: inject_weight and kl_budget exclude each other; the budget sets the weight")
        super().__post_init__()
        if self.budget_guarantee is not None and self.kl_budget is None:
            raise RecipeError("method.budget_guarantee bounds the KL by a budget; give it as method.kl_budget")
        if self.inject == "donor" and self.questions is None:
            raise RecipeError("method.inject: donor needs method.questions, a file of text questions for the donor")
        urls = [self.donor_endpoint] if isinstance(self.donor_endpoint, str) else self.donor_endpoint
        for url in urls or []:
            check_url(url, "method.donor_endpoint")
        if urls is not None and self.inject != "donor":
            raise RecipeError("method.donor_endpoint: donors answer with method.inject: donor only; leave it out")
        if self.start == "curvature" and self.kl_budget is None:
            raise RecipeError("method.start: curvature opens gates up to a KL; give it as method.kl_budget")
        if self.steps < 0 or self.learning_rate <= 0:
            raise RecipeError(f"method: steps ({self.steps}) and learning_rate ({self.learning_rate}) must be positive")
        for option in ("batches_per_step", "donor_tokens"):
            value = getattr(self, option)
            if value is not None and value < 1:
                raise RecipeError(f"method.{option}: {value} must be at least 1")


def fold(
    weight: Float[Tensor, "*experts out in"], factors: Factors, spectrum: Float[Tensor, "*experts r"]
) -> Float[Tensor, "*experts out in"]:
    """W + U diag(spectrum) Vh in float32. Directions with a zero spectrum are skipped, so that closed gates return W
    bit for bit. Fused experts are folded one by one."""
    weight = weight.float()
    if weight.ndim == 3:
        merged = weight.clone()
        for expert, (U, c, Vh) in enumerate(zip(factors.U, spectrum, factors.Vh, strict=True)):
            merged[expert] = _fold(weight[expert], U, c, Vh)
        return merged
    return _fold(weight, factors.U, spectrum, factors.Vh)


def _fold(weight: Tensor, U: Tensor, spectrum: Tensor, Vh: Tensor) -> Tensor:
    open_ = spectrum != 0
    if not bool(open_.any()):
        return weight
    return weight + (U.float()[:, open_] * spectrum.float()[open_]) @ Vh.float()[open_]


@dataclass(frozen=True, repr=False)
class GatedFold(Method):
    """Factors and gates that belong together, as a method that a merge runs on whole matrices.

    Its `repr` contains their digests and is equal in every process, because the resume key of a merge depends on it.
    """

    name: ClassVar[str] = "frism"
    whole_tensors: ClassVar[bool] = True
    reads_sources: ClassVar[bool] = False

    factors: Mapping[str, Factors]
    gates: Gates
    device: str = "cpu"

    def __post_init__(self) -> None:
        from vlmgraft.spectral.factor_store import check_gates

        check_gates(self.gates, self.factors)
        missing = [name for name in self.gates.logits if name not in self.factors]
        if missing:
            raise CheckpointError(f"{missing[0]}: there are gates but no factors for it; decompose again")

    def __repr__(self) -> str:
        from vlmgraft.spectral.factor_store import stored_digest

        state = hashlib.sha256(repr(self.gates.scale).encode())
        for name, logits in sorted(self.gates.logits.items()):
            state.update(name.encode() + logits.cpu().numpy().tobytes())
        where = "" if self.device == "cpu" else f", {self.device}"  # another device's last bits differ
        return f"GatedFold({stored_digest(self.factors)}, {state.hexdigest()[:16]}{where})"

    def task_vector_norm(self, name: str) -> float | None:
        """‖τ‖_F from the factors; with several donors, over all of them."""
        from vlmgraft.spectral.factor_store import Store

        return math.sqrt(self.factors.energy(name) if isinstance(self.factors, Store) else self.factors[name].energy)

    def sources_read(self) -> Mapping[str, Mapping[str, str]]:
        """Digests of the donors and their bases at the time of the decomposition."""
        from vlmgraft.spectral.factor_store import sources_of_factors

        return sources_of_factors(self.factors)

    def matrix(self, name: str, weight: Float[Tensor, "*experts out in"]) -> Float[Tensor, "*experts out in"]:
        """W_vlm + λ U diag(σ(g) ⊙ s) Vh of one tensor; raises CheckpointError when it has no gates or another shape."""
        if name not in self.gates.logits:
            raise CheckpointError(f"{name}: the recipe merges it, but it has no gates; learn gates for these modules")
        factors = self.factors[name]
        if tuple(weight.shape) != factors.shape:
            raise CheckpointError(f"{name}: factors of shape {factors.shape} for a weight of {tuple(weight.shape)}")
        factors = factors.to(self.device)
        return fold(weight.to(self.device), factors, self.gates.spectrum(name, factors.s)).to(weight.device)

    @property
    def divergence(self) -> dict[str, float]:
        """KL from the VLM on its own answers in nats per token, by prompt set; a lower and an upper bound where only
        the likeliest tokens of a large vocabulary were compared."""
        settings = self.gates.settings
        measured = {"KL from the VLM on held-out prompts": settings.get("held_out_kl")}
        if (upper := settings.get("held_out_kl_upper")) is not None:
            measured["the same, at most (beyond the 64 likeliest tokens it is bounded)"] = upper
        if self.gates.log:
            measured["KL from the VLM on the prompts of training"] = self.gates.log[-1].get("kl")
        return {name: float(kl) for name, kl in measured.items() if kl is not None}

    def notes(self) -> tuple[str, ...]:
        """The measured KL, the share of the task vector inside the factors, and the guaranteed bound."""
        from vlmgraft.spectral.factor_store import Store

        bound = self.gates.settings.get("guarantee")
        notes = tuple(f"{name}: {kl:.4g} nats per token" for name, kl in self.divergence.items())
        notes += () if bound is None else (bound["words"],)
        kept = self.factors.kept if isinstance(self.factors, Store) else 1.0
        return notes if kept > WHOLE else (f"the factors hold {kept:.1%} of ‖τ‖²; rank: full holds all", *notes)

    def apply(self, tensors: Mapping[str, Tensor], context: TensorContext) -> Tensor:
        """The merged matrix from the VLM's; the donor's side is in the factors."""
        return self.matrix(context.name, tensors["vlm"])
