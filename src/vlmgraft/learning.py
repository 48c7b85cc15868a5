"""From a recipe to gates: questions read, models loaded, gates learned and kept in a folder."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import torch

from vlmgraft.alignment import Alignment
from vlmgraft.checkpoint.reader import Reader
from vlmgraft.errors import RecipeError, WeightsError
from vlmgraft.hf.data import Question, load_questions
from vlmgraft.hf.models import load_processor, load_text_model, load_vlm
from vlmgraft.methods.curvature import Curvature
from vlmgraft.methods.frism import Frism
from vlmgraft.recipe import Recipe
from vlmgraft.spectral.factors import FactorStore
from vlmgraft.spectral.gates import Gates, load_gates
from vlmgraft.training.curvature import curvature_gates, estimate_curvature
from vlmgraft.training.distill import Distiller

Progress = Callable[[int, int, str], None]


def gated_method(recipe: Recipe) -> Frism | Curvature:
    """The recipe's method if it has factors and gates; raises RecipeError else."""
    if not isinstance(recipe.method, Frism | Curvature):
        raise RecipeError(f"method.name: {recipe.method.name} has no factors or gates; write frism or curvature")
    return recipe.method


def read_questions(recipe: Recipe) -> tuple[list[Question], list[Question], list[Question]]:
    """Calibration, held-out and text questions of a recipe; raises DataError naming file and line."""
    method = gated_method(recipe)
    calibration = method.calibration
    asked = load_questions(calibration.data, need_images=True, limit=calibration.samples + calibration.held_out)
    text = load_questions(method.questions) if isinstance(method, Frism) and method.questions else []
    return asked[: calibration.samples], asked[calibration.samples :], text


def check_inputs(recipe: Recipe, alignment: Alignment) -> None:
    """Before hours of work: the question files can be read, and no weight that takes part is NaN or infinite."""
    read_questions(recipe)
    for key in ("vlm", "donor", "donor_base"):
        checkpoint = getattr(alignment, key)
        with Reader(checkpoint) as reader:
            for tensor in alignment.merged:
                for name in (tensor.name,) if key == "vlm" else getattr(tensor, key).names:
                    if not torch.isfinite(reader.tensor(name)).all():
                        raise WeightsError(f"{name} in {checkpoint.tensors[name].file} ({key}): holds NaN or infinity")


def gates_for(recipe: Recipe, alignment: Alignment, store: FactorStore, out: Path, progress: Progress | None) -> Gates:
    """What `out` holds for this recipe and these factors, or gates learned now and saved there.

    A training that is interrupted goes on from the state file beside `out`.
    """
    wanted = {"recipe": asdict(gated_method(recipe)), "vlm": recipe.vlm, "donor": recipe.donor}
    if (out / "gates.json").is_file():
        found = load_gates(out)
        if found.factors == store.digest and found.settings.get("from") == wanted:
            return found
    state = out.with_name(out.name + ".state")
    learned = _learn(recipe, alignment, store, state, progress)
    gates = replace(learned, settings={**learned.settings, "from": wanted}, factors=store.digest)
    gates.save(out)
    state.unlink(missing_ok=True)
    return gates


def _learn(recipe: Recipe, alignment: Alignment, store: FactorStore, state: Path, progress: Progress | None) -> Gates:
    method = gated_method(recipe)
    learned, held_out, text = read_questions(recipe)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    distiller = Distiller(
        load_vlm(alignment.vlm.path, dtype, device),
        load_processor(alignment.vlm.path),
        {name: store[name] for name in store},
        learned,
        held_out,
        max_new_tokens=method.calibration.max_new_tokens,
        batch_size=method.calibration.batch_size,
        seed=method.seed,
        progress=progress,
    )
    if isinstance(method, Curvature):
        curvature = estimate_curvature(distiller, draws=method.draws, seed=method.seed)
        return curvature_gates(distiller, method.scale, method.kl_budget, curvature=curvature)
    donor = None
    if method.inject == "donor":
        path = alignment.donor.path
        donor = distiller.donor_targets(load_text_model(path, dtype, device), load_processor(path), text)
    fields = ("inject", "inject_weight", "kl_budget", "granularity", "steps", "learning_rate", "seed")
    settings = {key: getattr(method, key) for key in fields}
    return distiller.learn(method.scale, donor=donor, state=state, **settings)
