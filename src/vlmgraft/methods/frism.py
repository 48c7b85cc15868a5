"""FRISM: the donor's task vector through one learned gate per singular direction (arXiv 2601.21187).

    W = W_vlm + λ U diag(σ(g) ⊙ s) Vh

The dataclass holds the recipe; the gates are learned elsewhere (training/distill.py) from factors that are computed
once (spectral/decompose.py). `fold` is the last step: a plain matrix again, in float32, before the cast to the file's
dtype. `GatedFold` is the method that a merge runs once factors and gates exist.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar, Literal

from vlmgraft.errors import CheckpointError, RecipeError
from vlmgraft.methods.base import DEFAULT_MODULES, TensorContext

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor

    from vlmgraft.spectral.factors import Factors
    from vlmgraft.spectral.gates import Gates


@dataclass(frozen=True)
class Calibration:
    """The prompts that gates are learned on, and those on which the drift is measured."""

    data: str
    """Question file with images, relative to where the command runs."""
    samples: int = 512
    """Questions that are learned from."""
    held_out: int = 128
    """Further questions, on which the drift is measured."""
    max_new_tokens: int = 64
    """Length of the VLM's answers, tokens."""
    batch_size: int = 8
    """Questions in a batch."""
    packing: Literal["length", "shuffle"] = "length"
    """Batches of similar length (little padding), or shuffled."""
    tokens: Literal["answer", "all"] = "answer"
    """The drift is that of the answer, or of all text."""

    def __post_init__(self) -> None:
        for name in ("samples", "max_new_tokens", "batch_size"):
            if getattr(self, name) < 1:
                raise RecipeError(f"method.calibration.{name}: {getattr(self, name)} must be at least 1")
        if self.held_out < 0:
            raise RecipeError(f"method.calibration.held_out: {self.held_out} must not be negative")


@dataclass(frozen=True)
class Frism:
    """The recipe of gates and of the merge with them."""

    name: ClassVar[str] = "frism"
    needs: ClassVar[frozenset[str]] = frozenset({"donor_base"})
    default_modules: ClassVar[tuple[str, ...]] = DEFAULT_MODULES

    scale: float = 1.0
    """λ, a factor on the gated task vector."""
    inject: Literal["energy", "donor"] = "energy"
    """Why gates open: `energy` is the published term, `donor` matches the donor's answers."""
    inject_weight: float | None = None
    """α, the weight of that term; not beside kl_budget; default 0.1 for energy, 1 for donor."""
    kl_budget: float | None = None
    """Allowed drift from the VLM, nats per token; α follows."""
    questions: str | list[str] | None = None
    """Of inject: donor, a file of text questions, or one file per donor."""
    rank: Literal["full"] | int | dict[Literal["energy"], float] = "full"
    """Directions per matrix: full, a number, or {energy: share}."""
    granularity: Literal["direction", "matrix", "layer"] = "direction"
    """One gate per singular direction, per matrix or per layer."""
    start: Literal["half", "curvature"] = "half"
    """Gates start half open, or (with a kl_budget) as the calibration set's curvature has them at the budget; several
    processes then hold whole weights."""
    steps: int = 200
    """Training steps."""
    learning_rate: float = 0.05
    """Of Adam, on the gates' logits."""
    batches_per_step: int = 1
    """Batches averaged for one step: as many as there are GPUs, or a multiple."""
    gradient_checkpointing: bool = False
    """Less memory, more time, the same gates."""
    seed: int = 0
    """Of the order of batches."""
    calibration: Calibration = field(default_factory=lambda: Calibration("calibration.jsonl"))
    """The image questions on which the VLM is kept."""

    def bind(self, factors: Mapping[str, Factors], gates: Gates) -> GatedFold:
        """The method that a merge runs, once gates are learned."""
        return GatedFold(factors, gates)

    def __post_init__(self) -> None:
        if self.inject_weight is not None and self.kl_budget is not None:
            raise RecipeError("method: inject_weight and kl_budget exclude each other; the budget sets the weight")
        if self.kl_budget is not None and self.kl_budget <= 0:
            raise RecipeError(f"method.kl_budget: {self.kl_budget} must be above 0; a zero budget is the VLM itself")
        if self.kl_budget is not None and self.calibration.held_out == 0:
            raise RecipeError("method.kl_budget is measured on held-out prompts; set method.calibration.held_out")
        if self.inject == "donor" and self.questions is None:
            raise RecipeError("method.inject: donor needs method.questions, a file of text questions for the donor")
        if self.start == "curvature" and self.kl_budget is None:
            raise RecipeError("method.start: curvature opens gates up to a drift; give it as method.kl_budget")
        if self.steps < 0 or self.learning_rate <= 0:
            raise RecipeError(f"method: steps ({self.steps}) and learning_rate ({self.learning_rate}) must be positive")
        if self.batches_per_step < 1:
            raise RecipeError(f"method.batches_per_step: {self.batches_per_step} must be at least 1")
        if isinstance(self.rank, int) and self.rank < 1:
            raise RecipeError(f"method.rank: {self.rank} must be at least 1")
        if isinstance(self.rank, dict) and not 0 < self.rank.get("energy", 0) <= 1:
            raise RecipeError(f"method.rank: {self.rank} must be {{energy: share}} with a share above 0, at most 1")


def fold(
    weight: Float[Tensor, "*experts out in"], factors: Factors, spectrum: Float[Tensor, "*experts r"]
) -> Float[Tensor, "*experts out in"]:
    """W + U diag(spectrum) Vh in float32; directions whose spectrum is zero are left out, so that closed gates give
    back W bit for bit. Fused experts one by one."""
    weight = weight.float()
    if weight.ndim == 3:
        merged = weight.clone()
        for place, (U, c, Vh) in enumerate(zip(factors.U, spectrum, factors.Vh, strict=True)):
            merged[place] = _fold(weight[place], U, c, Vh)
        return merged
    return _fold(weight, factors.U, spectrum, factors.Vh)


def _fold(weight: Tensor, U: Tensor, spectrum: Tensor, Vh: Tensor) -> Tensor:
    open_ = spectrum != 0
    if not bool(open_.any()):
        return weight
    return weight + (U.float()[:, open_] * spectrum.float()[open_]) @ Vh.float()[open_]


@dataclass(frozen=True, repr=False)
class GatedFold:
    """Factors and gates that belong together, as a method that a merge runs on whole matrices.

    Its `repr` names what it holds by digest, the same in every process: a merge is resumed by it.
    """

    name: ClassVar[str] = "frism"
    needs: ClassVar[frozenset[str]] = frozenset()
    default_modules: ClassVar[tuple[str, ...]] = DEFAULT_MODULES
    granularity: ClassVar[Literal["element", "tensor"]] = "tensor"

    factors: Mapping[str, Factors]
    gates: Gates

    def __post_init__(self) -> None:
        known = getattr(self.factors, "digest", None)
        if known is not None and self.gates.factors is not None and known != self.gates.factors:
            raise CheckpointError(
                f"the gates were learned on factors {self.gates.factors}, not on these ({known}): learn them again"
            )
        missing = [name for name in self.gates.logits if name not in self.factors]
        if missing:
            raise CheckpointError(f"{missing[0]}: there are gates but no factors for it; decompose again")

    def __repr__(self) -> str:
        state = hashlib.sha256(repr(self.gates.scale).encode())
        for name, logits in sorted(self.gates.logits.items()):
            state.update(name.encode() + logits.cpu().numpy().tobytes())
        return f"GatedFold({getattr(self.factors, 'digest', None)}, {state.hexdigest()[:16]})"

    def matrix(self, name: str, weight: Float[Tensor, "*experts out in"]) -> Float[Tensor, "*experts out in"]:
        """W_vlm + λ U diag(σ(g) ⊙ s) Vh of one tensor; raises CheckpointError when it has no gates or another shape."""
        if name not in self.gates.logits:
            raise CheckpointError(f"{name}: the recipe merges it, but it has no gates; learn gates for these modules")
        factors = self.factors[name]
        if tuple(weight.shape) != factors.shape:
            raise CheckpointError(f"{name}: factors of shape {factors.shape} for a weight of {tuple(weight.shape)}")
        return fold(weight, factors, self.gates.spectrum(name, factors.s))

    def combine(self, tensors: Mapping[str, Tensor], context: TensorContext) -> Tensor:
        """The merged matrix from the VLM's; the donor's side is in the factors."""
        return self.matrix(context.name, tensors["vlm"])
