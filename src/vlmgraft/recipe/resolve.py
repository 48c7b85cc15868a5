"""Turns a recipe into a job (checkpoints opened and aligned, questions read, once) or a plan (from headers alone)."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from vlmgraft.alignment import Alignment, align
from vlmgraft.checkpoint.hub import check_access
from vlmgraft.checkpoint.index import open_checkpoint, open_headers
from vlmgraft.errors import AlignmentError, DataError, RecipeError
from vlmgraft.merging.plan import MergePlan, plan_merge
from vlmgraft.methods.base import check_numbers
from vlmgraft.methods.frism import Frism, GatedFold, GatedMethod
from vlmgraft.recipe.model import Recipe, load_recipe
from vlmgraft.storage.listed import listed

if TYPE_CHECKING:
    from vlmgraft.checkpoint.index import Checkpoint
    from vlmgraft.data.questions import Question

RecipeSource = str | Path | Mapping[str, Any] | Recipe


class Questions(NamedTuple):
    """The questions of a gated method: the calibration set, held-out prompts, each donor's text questions (empty
    without donor matching), and unseen prompts for the budget guarantee (empty without one)."""

    learned: list[Question]
    held_out: list[Question]
    donors: list[list[Question]]
    unseen: list[Question]

    @property
    def digests(self) -> tuple[str, ...]:
        """Fingerprints of prompts and images, part by part."""
        from vlmgraft.data.questions import questions_digest

        unseen = [self.unseen] if self.unseen else []
        return tuple(questions_digest(part) for part in (self.learned, self.held_out, *self.donors, *unseen))


@dataclass(frozen=True)
class Job:
    """A recipe with its checkpoints and questions, opened once; passed to checking, decomposing, learning and folding.

    alignments: one per donor. questions: of a gated method, with their images read. digests: fingerprints of the
    questions, part by part.
    """

    recipe: Recipe
    alignments: tuple[Alignment, ...]
    questions: Questions | None = None
    digests: tuple[str, ...] = ()

    @property
    def method(self) -> GatedMethod:
        """The recipe's method; raises RecipeError if it has no factors and gates."""
        return gated_method(self.recipe)

    @property
    def required_questions(self) -> Questions:
        """The questions; raises RecipeError if the job was resolved without them: it then has no learning stage."""
        if self.questions is None:
            raise RecipeError(f"method.name: {self.recipe.method.name}: the job was resolved without questions")
        return self.questions

    @property
    def alignment(self) -> Alignment:
        """The first donor's alignment."""
        return self.alignments[0]

    @property
    def vlm(self) -> Checkpoint:
        """The model that is merged into."""
        return self.alignment.vlm

    @property
    def sources(self) -> list[Checkpoint]:
        """All checkpoints, of every donor."""
        return [checkpoint for alignment in self.alignments for checkpoint in alignment.opened.values()]

    @property
    def folders(self) -> list[Path]:
        """The folders of all checkpoints."""
        return [checkpoint.path for checkpoint in self.sources]


def resolve(recipe: RecipeSource, overrides: Sequence[str] = (), *, questions: bool = True) -> Job:
    """Read a recipe, align its checkpoints by their headers, check its options, and read its questions and images.

    questions: False for a job without a learning stage.

    Raises:
        RecipeError, CheckpointError, AlignmentError. DataError: naming file and line.
    """
    loaded = read_recipe(recipe, overrides)
    alignments = tuple(pairs(loaded))
    check_numbers(loaded.method, alignments[0])
    if not (questions and isinstance(loaded.method, GatedMethod)):
        return Job(loaded, alignments)
    parts = read_questions(loaded)
    return Job(loaded, alignments, parts, parts.digests)


def gated_method(recipe: Recipe) -> GatedMethod:
    """The recipe's method if it has factors and gates; otherwise raises RecipeError."""
    if not isinstance(recipe.method, GatedMethod):
        raise RecipeError(f"method.name: {recipe.method.name} has no factors or gates; write frism or curvature")
    return recipe.method


def read_questions(recipe: Recipe) -> Questions:
    """The questions of a recipe with a gated method; every image file is read once (`hold_images`).

    Raises DataError naming file and line, RecipeError when there are too few files.
    """
    from vlmgraft.data.questions import hold_images

    method = gated_method(recipe)
    learned, seen = method.calibration.samples, method.calibration.samples + method.calibration.held_out
    images = calibration_questions(method, check_images=False)
    donors = text_questions(recipe)
    held = hold_images(images)
    _warn_of_order(method.calibration.data, held[:learned], held[learned:])
    return Questions(held[:learned], held[learned:seen], donors, held[seen:])


def calibration_questions(method: GatedMethod, *, check_images: bool = True) -> list[Question]:
    """The questions that gates are learned and then measured on; raises DataError, also if a budget has too few."""
    from vlmgraft.data.questions import load_questions

    guarantee = method.budget_guarantee if isinstance(method, Frism) else None
    learned, seen = method.calibration.samples, method.calibration.samples + method.calibration.held_out
    count = seen + (guarantee.prompts if guarantee is not None else 0)
    source = method.calibration
    images = load_questions(
        source.data, need_images=True, limit=count, check_images=check_images, columns=source.columns
    )
    if guarantee is not None and len(images) < count:
        raise DataError(
            f"{method.calibration.data}: has {max(0, len(images) - seen)} questions behind the first {seen}, "
            f"method.budget_guarantee.prompts is {guarantee.prompts}; add questions, or lower calibration.samples, "
            "held_out or prompts"
        )
    if method.kl_budget is not None and len(images) <= learned:
        raise DataError(
            f"{method.calibration.data}: has {len(images)} questions; method.kl_budget {method.kl_budget:g} is learned "
            f"on {learned} and measured on others. Add questions, or lower method.calibration.samples"
        )
    return [replace(question, max_pixels=method.calibration.max_pixels) for question in images]


def text_questions(recipe: Recipe) -> list[list[Question]]:
    """The text questions of every donor, [[]] if the method has none; raises DataError, RecipeError."""
    from vlmgraft.data.questions import load_questions

    method = recipe.method
    if not isinstance(method, Frism) or not method.questions:
        return [[]]
    files = [method.questions] if isinstance(method.questions, str) else list(method.questions)
    number = 1 + len(recipe.more_donors)
    if len(files) not in (1, number):
        raise RecipeError(f"method.questions: {len(files)} files for {number} donors; give one, or one per donor")
    read = {file: load_questions(file) for file in dict.fromkeys(files)}
    return [read[file] for file in (files * number if len(files) == 1 else files)]


def _warn_of_order(file: str, learned: Sequence[Question], measured: Sequence[Question]) -> None:
    """Warn if the KL is measured on categories without calibration questions, as in a sorted file."""
    unseen = {question.category for question in measured} - {question.category for question in learned}
    if unseen:
        names = ", ".join(sorted(str(name) for name in unseen)[:5])
        warnings.warn(
            f"{file}: the first {len(learned)} questions hold none of the category {names}, on which the KL is "
            "measured; shuffle the lines",
            stacklevel=2,
        )


@dataclass(frozen=True)
class Plan:
    """What a merge would do, from headers alone: counts by verdict, bytes written, notes, one row per tensor.

    cost: files, bytes, expected seconds and memory of the streaming (for FRISM without decomposition and gates); None
    when the recipe names no method.
    """

    family: str
    layers: int
    merged: int
    kept: int
    excluded: int
    nbytes: int
    notes: tuple[str, ...]
    tensors: tuple[dict[str, Any], ...]
    cost: MergePlan | None = None


def read_recipe(recipe: RecipeSource, overrides: Sequence[str] = (), *, need_method: bool = True) -> Recipe:
    """A validated recipe from a file or mapping with `overrides`, or the given one; raises RecipeError."""
    if not isinstance(recipe, Recipe):
        return load_recipe(recipe, overrides, need_method=need_method)
    if overrides:
        raise RecipeError(f"{listed(overrides)[0]}: a Recipe is validated already; give them to load_recipe")
    return recipe


def pair(recipe: Recipe, *, headers_only: bool = False) -> Alignment:
    """Open the recipe's checkpoints (headers) and align them; raises CheckpointError and AlignmentError."""
    if not headers_only:
        check_access(recipe.models)
    opener = open_headers if headers_only else open_checkpoint
    optional = [opener(source) if source else None for source in (recipe.donor_base, recipe.vlm_base)]
    return align(opener(recipe.vlm), opener(recipe.donor), *optional, modules=recipe.modules, layers=recipe.layers)


def pairs(recipe: Recipe) -> list[Alignment]:
    """One alignment per donor of the recipe; raises as `pair`, and AlignmentError if their tensors differ."""
    every = [pair(recipe)]
    for other in recipe.more_donors:
        every.append(pair(recipe.model_copy(update={"donor": other.donor, "donor_base": other.donor_base})))
        odd = {tensor.name for tensor in every[0].merged} ^ {tensor.name for tensor in every[-1].merged}
        if odd:
            raise AlignmentError(f"{sorted(odd)[0]}: not all donors have it; leave it out of `modules`")
    return every


def inspect(recipe: RecipeSource, overrides: Sequence[str] = ()) -> Plan:
    """Which tensors pair, and why, from headers only (of hub ids by range requests)."""
    loaded = read_recipe(recipe, overrides, need_method=False)
    return plan(loaded, pair(loaded, headers_only=True))


def plan(recipe: Recipe, alignment: Alignment) -> Plan:
    """The plan of a recipe whose checkpoints are aligned; raises RecipeError for options that fit no tensor."""
    cost = None
    if recipe.method is not None:
        streamed = GatedFold if isinstance(recipe.method, GatedMethod) else recipe.method
        check_numbers(recipe.method, alignment)
        cost = plan_merge(alignment, streamed, recipe.output.shard_bytes, float32=recipe.output.dtype == "float32")
    verdicts = [tensor.verdict for tensor in alignment.tensors]
    rows = tuple(
        {
            "name": tensor.name,
            "verdict": tensor.verdict,
            "reason": tensor.reason,
            "shape": list(alignment.vlm.tensors[tensor.name].shape),
            "dtype": alignment.vlm.tensors[tensor.name].dtype,
            "donor": list(tensor.donor.names) if tensor.donor else [],
        }
        for tensor in alignment.tensors
    )
    counts = {verdict: verdicts.count(verdict) for verdict in ("merged", "kept", "excluded")}
    nbytes = sum(info.nbytes for info in alignment.vlm.tensors.values())
    notes = (*alignment.notes, alignment.left_out)
    return Plan(alignment.family, alignment.layers, **counts, nbytes=nbytes, notes=notes, tensors=rows, cost=cost)
