"""From a recipe to gates: questions read, models loaded, gates learned and kept in a folder.

Under `torchrun` or `accelerate launch` every process runs the same calls: the teacher's batches are shared out, weights
and factors are sharded, and the first process writes the gates.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from vlmgraft.alignment import Alignment
from vlmgraft.checkpoint.reader import Reader
from vlmgraft.durable import sweep_files
from vlmgraft.errors import OutputError, RecipeError, WeightsError
from vlmgraft.folders import make_folder
from vlmgraft.hf.data import Question, check_lengths, load_questions
from vlmgraft.hf.models import load_config, load_processor, load_text_model, load_vlm
from vlmgraft.methods.curvature import Curvature
from vlmgraft.methods.frism import Frism
from vlmgraft.publishing import sweep_folders
from vlmgraft.recipe import Recipe
from vlmgraft.spectral.decompose import check_store, decompose
from vlmgraft.spectral.delta import checkpoint_digest
from vlmgraft.spectral.donors import JoinedStore, donor_folder, open_store
from vlmgraft.spectral.factors import FactorStore
from vlmgraft.spectral.gates import Gates, load_gates
from vlmgraft.training.cache import questions_digest
from vlmgraft.training.curvature import curvature_gates, curvature_start, estimate_curvature
from vlmgraft.training.distill import Distiller
from vlmgraft.training.processes import barrier, join_group, local_device, process
from vlmgraft.training.targets import Targets, join_targets

Progress = Callable[[int, int, str], None]
Store = FactorStore | JoinedStore
SETTINGS = (
    "inject",
    "inject_weight",
    "kl_budget",
    "granularity",
    "steps",
    "learning_rate",
    "batches_per_step",
    "seed",
    "gradient_checkpointing",
)


def gated_method(recipe: Recipe) -> Frism | Curvature:
    """The recipe's method if it has factors and gates; raises RecipeError else."""
    if not isinstance(recipe.method, Frism | Curvature):
        raise RecipeError(f"method.name: {recipe.method.name} has no factors or gates; write frism or curvature")
    return recipe.method


def read_questions(recipe: Recipe) -> tuple[list[Question], list[Question], list[list[Question]]]:
    """Calibration and held-out questions of a recipe, and the text questions of every donor (one empty list without
    donor matching); raises DataError naming file and line, RecipeError when there are too few files."""
    method = gated_method(recipe)
    calibration = method.calibration
    asked = load_questions(calibration.data, need_images=True, limit=calibration.samples + calibration.held_out)
    text: list[list[Question]] = [[]]
    if isinstance(method, Frism) and method.questions:
        files = [method.questions] if isinstance(method.questions, str) else list(method.questions)
        donors = 1 + len(recipe.more_donors)
        if len(files) not in (1, donors):
            raise RecipeError(f"method.questions: {len(files)} files for {donors} donors; give one, or one per donor")
        text = [load_questions(file) for file in (files * donors if len(files) == 1 else files)]
    return asked[: calibration.samples], asked[calibration.samples :], text


def check_inputs(recipe: Recipe, alignments: Sequence[Alignment]) -> None:
    """Before hours of work: questions and images can be read and fit in the models' contexts, and no weight that takes
    part is NaN or infinite. Raises DataError, RecipeError, WeightsError."""
    check_questions(recipe, alignments)
    for number, alignment in enumerate(alignments):
        for key in ("vlm", "donor", "donor_base") if number == 0 else ("donor", "donor_base"):
            checkpoint = getattr(alignment, key)
            with Reader(checkpoint) as reader:
                for tensor in alignment.merged:
                    for name in (tensor.name,) if key == "vlm" else getattr(tensor, key).names:
                        if not torch.isfinite(reader.tensor(name)).all():
                            file = checkpoint.tensors[name].file
                            raise WeightsError(f"{name} in {file} ({key}): holds NaN or infinity")


def check_questions(recipe: Recipe, alignments: Sequence[Alignment]) -> None:
    """The part of `check_inputs` that is about questions."""
    method = gated_method(recipe)
    vlm = alignments[0].vlm
    learned, held_out, text = read_questions(recipe)
    longest = method.calibration.max_new_tokens
    config, processor = load_config(vlm.path), load_processor(vlm.path)
    check_lengths(config, processor, [*learned, *held_out], longest)
    for alignment, asked in zip(alignments, text, strict=False):
        if asked:
            check_lengths(config, processor, asked, longest)
            path = alignment.donor.path
            check_lengths(load_config(path), load_processor(path), asked, longest)


def factors_for(
    recipe: Recipe, alignments: Sequence[Alignment], out: Path, *, resume: bool, progress: Progress | None
) -> Store:
    """Factors of every donor under `out`, as `decompose` makes them; on a GPU, with the copies that training reads."""
    rank: Any = gated_method(recipe).rank
    make_folder(out.parent)
    device = local_device()
    options: dict[str, Any] = {"resume": resume, "train_copy": device.type == "cuda", "device": device}
    join_group()
    for number, alignment in enumerate(alignments):
        decompose(alignment, donor_folder(out, number), rank, progress=progress, **options)
    barrier()  # every process has done its share
    return open_store(out)


def check_factors(recipe: Recipe, alignments: Sequence[Alignment], folder: Path) -> None:
    """Raise CheckpointError unless the folder holds the factors of this recipe, of every donor."""
    rank: Any = gated_method(recipe).rank
    for number, alignment in enumerate(alignments):
        check_store(alignment, FactorStore(donor_folder(folder, number)), rank)


def gates_for(
    recipe: Recipe,
    alignments: Sequence[Alignment],
    store: Store,
    out: Path,
    progress: Progress | None,
    *,
    replace_others: bool = True,
) -> Gates:
    """What `out` holds for this recipe, these questions and factors, or gates learned now and saved there.

    Beside `out`, `out.teacher` keeps the teacher's answers and log-probabilities, a batch at a time, and `out.state`
    the training, every few steps: what was interrupted goes on from them. alignments: one per donor. replace_others:
    gates of another recipe are replaced; otherwise they raise OutputError.
    """
    join_group()
    rank = process()[0]
    wanted = wanted_of(recipe, alignments)
    if (out / "gates.json").is_file():
        found = load_gates(out)
        if found.factors == store.digest and found.settings.get("from") == wanted:
            if rank == 0:
                _drop_state(out)  # of a run that was killed between the gates and this
            return found
        if not replace_others:
            raise OutputError(f"{out}: holds gates of another recipe; name another folder, or remove it first")
    barrier()
    learned = _learn(recipe, alignments, store, out, progress if rank == 0 else None)
    gates = replace(learned, settings={**learned.settings, "from": wanted}, factors=store.digest)
    if rank == 0:
        gates.save(out)
        _drop_state(out)
    barrier()
    return gates


def _drop_state(out: Path) -> None:
    """Remove the state of a training that is done, and what killed runs left."""
    state = out.with_name(out.name + ".state")
    state.unlink(missing_ok=True)
    sweep_files(state.parent, state.name)
    sweep_folders(out, finished=True)


def wanted_of(recipe: Recipe, alignments: Sequence[Alignment]) -> dict[str, Any]:
    """What gates must have been learned from to be used again; JSON values."""
    method: dict[str, Any] = asdict(gated_method(recipe))
    method.pop("gradient_checkpointing", None)  # memory only: the gates are the same
    learned, held_out, text = read_questions(recipe)
    return {
        "recipe": method,
        "vlm": checkpoint_digest(alignments[0].vlm),
        "donors": [
            [str(alignment.donor.path), str(getattr(alignment.donor_base, "path", None))] for alignment in alignments
        ],
        "questions": [questions_digest(part) for part in (learned, held_out, *text)],
    }


def _learn(
    recipe: Recipe, alignments: Sequence[Alignment], store: Store, out: Path, progress: Progress | None
) -> Gates:
    method = gated_method(recipe)
    distiller, donor = distiller_for(recipe, alignments, store, out, progress)
    if isinstance(method, Curvature):
        found = estimate_curvature(distiller, draws=method.draws, seed=method.seed)
        return curvature_gates(distiller, method.scale, method.kl_budget, curvature=found)
    state = out.with_name(out.name + ".state")
    start: Gates | float = 0.0
    if method.start == "curvature" and method.kl_budget is not None and not state.is_file():
        start = curvature_start(distiller, method.scale, method.kl_budget, seed=method.seed)
    settings = {key: getattr(method, key) for key in SETTINGS}
    return distiller.learn(method.scale, donor=donor, state=state, start=start, **settings)


def distiller_for(
    recipe: Recipe, alignments: Sequence[Alignment], store: Store, out: Path, progress: Progress | None
) -> tuple[Distiller, Targets | None]:
    """The recipe's models and questions, ready to train; with the donors' targets for donor matching."""
    method = gated_method(recipe)
    learned, held_out, text = read_questions(recipe)
    device = local_device()
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    vlm = alignments[0].vlm
    curvature = isinstance(method, Curvature) or method.start == "curvature"
    distiller = Distiller(
        load_vlm(vlm.path, dtype, device),
        load_processor(vlm.path),
        store,
        learned,
        held_out,
        max_new_tokens=method.calibration.max_new_tokens,
        batch_size=method.calibration.batch_size,
        packing=method.calibration.packing,
        tokens=method.calibration.tokens,
        seed=method.seed,
        progress=progress,
        cache=out.with_name(out.name + ".teacher"),
        sharded=process()[1] > 1 and not curvature,
        keep_factors=curvature,
    )
    if isinstance(method, Curvature) or method.inject != "donor":
        return distiller, None
    parts = []
    for alignment, asked in zip(alignments, text, strict=True):
        path = alignment.donor.path
        parts.append(distiller.donor_targets(load_text_model(path, dtype, device), load_processor(path), asked))
    return distiller, join_targets(parts)
