"""The public functions behind the commands: recipe in, finished folders out.

Each arrow leaves files that can be looked at and resumed from:
recipe → alignment → factors/ → gates/ → merged checkpoint with receipt. torch is loaded when work starts, not before.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from vlmgraft.alignment import Alignment, align
from vlmgraft.card import push_to_hub, side_files, write_model_card
from vlmgraft.checkpoint.hub import open_headers
from vlmgraft.checkpoint.index import open_checkpoint
from vlmgraft.errors import OutputError, RecipeError, WeightsError
from vlmgraft.methods.frism import Frism
from vlmgraft.recipe import Recipe, dump_recipe, load_recipe, save_recipe

if TYPE_CHECKING:
    from vlmgraft.hf.data import Question
    from vlmgraft.merge import Receipt
    from vlmgraft.spectral.factors import FactorStore
    from vlmgraft.spectral.gates import Gates

Progress = Callable[[int, int, str], None]
RecipeSource = str | Path | Mapping[str, Any] | Recipe


@dataclass(frozen=True)
class Plan:
    """What a merge would do, from headers alone: counts by verdict, bytes written, notes, one row per tensor."""

    family: str
    layers: int
    merged: int
    kept: int
    excluded: int
    nbytes: int
    notes: tuple[str, ...]
    tensors: tuple[dict[str, Any], ...]


def read_recipe(recipe: RecipeSource, overrides: Sequence[str] = (), *, need_method: bool = True) -> Recipe:
    """A validated recipe from a file, or the given one; raises RecipeError."""
    return recipe if isinstance(recipe, Recipe) else load_recipe(recipe, overrides, need_method=need_method)


def pair(recipe: Recipe, *, headers_only: bool = False) -> Alignment:
    """Open the recipe's checkpoints (headers) and align them; raises CheckpointError and AlignmentError."""
    opener = open_headers if headers_only else open_checkpoint
    optional = [opener(source) if source else None for source in (recipe.donor_base, recipe.vlm_base)]
    return align(opener(recipe.vlm), opener(recipe.donor), *optional, modules=recipe.modules, layers=recipe.layers)


def inspect(recipe: RecipeSource, overrides: Sequence[str] = ()) -> Plan:
    """What pairs with what, reading headers only (of hub ids by range requests)."""
    return plan(pair(read_recipe(recipe, overrides, need_method=False), headers_only=True))


def plan(alignment: Alignment) -> Plan:
    """The plan of an alignment."""
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
    return Plan(alignment.family, alignment.layers, **counts, nbytes=nbytes, notes=alignment.notes, tensors=rows)


def merge(
    recipe: RecipeSource,
    out: str | Path,
    *,
    overrides: Sequence[str] = (),
    resume: bool = False,
    workdir: str | Path | None = None,
    threads: int = 2,
    progress: Progress | None = None,
) -> Receipt:
    """Merge as the recipe says and publish a finished checkpoint at `out`.

    A FRISM recipe decomposes, learns and folds in one go; `workdir` (default: a hidden folder beside `out`, removed
    at the end) keeps factors and gates, and what it already holds for the same inputs is not computed again.

    Raises:
        RecipeError, CheckpointError, AlignmentError, OutputError: before anything is written.
        NumericalError: NaN, infinity or overflow, naming the tensor; nothing is published.
    """
    recipe, out = read_recipe(recipe, overrides), Path(out)
    from vlmgraft.checkpoint.writer import refuse_output
    from vlmgraft.merge import merge_tensors

    alignment = pair(recipe)
    sources = (alignment.vlm, alignment.donor, alignment.donor_base, alignment.vlm_base)
    refuse_output(out, [source.path for source in sources if source is not None])
    with ExitStack() as stack:
        method: Any = recipe.method
        if isinstance(method, Frism):
            _check_inputs(recipe, alignment)
            kept = Path(workdir) if workdir else out.with_name(f".{out.name}.work")
            store = _decompose(alignment, method, kept / "factors", resume=True, progress=progress)
            learned = _gates(recipe, alignment, store, kept / "gates", progress=progress)
            from vlmgraft.methods.frism import GatedFold

            method = GatedFold(store, learned)
            if workdir is None:
                stack.callback(shutil.rmtree, kept, ignore_errors=True)
        side = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        save_recipe(recipe, side / "recipe.yaml")
        write_model_card(side, dump_recipe(recipe), alignment)
        extra = [file for file in side_files(alignment.vlm.path) if file.name != "recipe.yaml"]
        return merge_tensors(
            alignment,
            method,
            out,
            shard_size=recipe.output.shard_bytes,
            threads=threads,
            progress=progress,
            extra_files=[*extra, side / "recipe.yaml", side / "README.md"],
            resume=resume,
        )


def decompose(
    recipe: RecipeSource,
    out: str | Path,
    *,
    overrides: Sequence[str] = (),
    resume: bool = False,
    progress: Progress | None = None,
) -> FactorStore:
    """SVD of the donor's task vector into a factor store at `out`, one file per matrix."""
    recipe = read_recipe(recipe, overrides)
    return _decompose(pair(recipe), _frism(recipe), Path(out), resume=resume, progress=progress)


def gates(
    recipe: RecipeSource,
    factors: str | Path,
    out: str | Path,
    *,
    overrides: Sequence[str] = (),
    progress: Progress | None = None,
) -> Gates:
    """FRISM's second stage on a factor store; writes the gates folder `out`."""
    from vlmgraft.spectral.factors import FactorStore

    recipe = read_recipe(recipe, overrides)
    _questions(recipe)
    if Path(out).exists():
        raise OutputError(f"{out}: exists already; name another folder, or remove it first")
    return _gates(recipe, pair(recipe), FactorStore(factors), Path(out), progress=progress)


def export(
    source: str | Path,
    to: Literal["lora", "hub"],
    *,
    out: str | Path | None = None,
    factors: str | Path | None = None,
    vlm: str | None = None,
    rank: int = 64,
    name: str | None = None,
    private: bool = True,
) -> dict[str, Any]:
    """A merged folder to the hub, or a gates folder as a LoRA adapter in PEFT's format with its error per matrix.

    Args:
        source: a merged folder (hub) or a gates folder (lora).
        out, factors, vlm, rank: of an adapter: the folder to write, the factors of the gates, the VLM it applies to.
        name, private: of the hub: organisation/name, and whether others can see it.
    Raises:
        RecipeError: an argument is missing. CheckpointError, OutputError: as the parts say.
    """
    if to == "hub":
        if name is None:
            raise RecipeError("export --to hub: give --name organisation/name")
        return {"address": push_to_hub(Path(source), name, private=private)}
    if not (out and factors and vlm):
        raise RecipeError("export --to lora: give --out, --factors (of `decompose` or the workdir) and --vlm")
    from vlmgraft.lora import export_lora
    from vlmgraft.spectral.factors import FactorStore
    from vlmgraft.spectral.gates import load_gates

    return asdict(export_lora(vlm, FactorStore(factors), load_gates(source), out, rank))


def _frism(recipe: Recipe) -> Frism:
    if not isinstance(recipe.method, Frism):
        raise RecipeError(f"method.name: {recipe.method.name} has no factors or gates; write frism")
    return recipe.method


def _decompose(
    alignment: Alignment, method: Frism, out: Path, *, resume: bool, progress: Progress | None
) -> FactorStore:
    from vlmgraft.spectral.decompose import decompose as decompose_into

    out.parent.mkdir(parents=True, exist_ok=True)
    rank: Any = method.rank
    return decompose_into(alignment, out, rank, resume=resume, progress=progress)


def _gates(recipe: Recipe, alignment: Alignment, store: FactorStore, out: Path, *, progress: Progress | None) -> Gates:
    """Load what `out` holds for this recipe and these factors, or learn and save it."""
    from vlmgraft.records import as_dict
    from vlmgraft.spectral.gates import load_gates

    method = _frism(recipe)
    wanted = {"recipe": as_dict(method), "vlm": str(recipe.vlm), "donor": str(recipe.donor)}
    if (out / "gates.json").is_file():
        found = load_gates(out)
        if found.factors == store.digest and found.settings.get("from") == wanted:
            return found
    learned = learn_gates(recipe, alignment, store, state=out.with_name(out.name + ".state"), progress=progress)
    from vlmgraft.spectral.gates import Gates

    settings = {**learned.settings, "from": wanted}
    finished = Gates(learned.logits, learned.scale, settings, learned.log, store.digest)
    finished.save(out)
    return finished


def learn_gates(
    recipe: Recipe,
    alignment: Alignment,
    store: FactorStore,
    *,
    state: Path | None = None,
    progress: Progress | None = None,
) -> Gates:
    """Load the models, cache their answers and train the gates of a FRISM recipe."""
    import torch

    from vlmgraft.hf.models import load_processor, load_text_model, load_vlm
    from vlmgraft.training.distill import Distiller

    method = _frism(recipe)
    calibration = method.calibration
    learned, held_out, text = _questions(recipe)
    vlm, donor_path = alignment.vlm.path, alignment.donor.path
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    distiller = Distiller(
        load_vlm(vlm, dtype, device),
        load_processor(vlm),
        {name: store[name] for name in store},
        learned,
        held_out,
        max_new_tokens=calibration.max_new_tokens,
        batch_size=calibration.batch_size,
        seed=method.seed,
        progress=progress,
    )
    donor = None
    if text:
        donor = distiller.donor_targets(load_text_model(donor_path, dtype, device), load_processor(donor_path), text)
    options = asdict(method)
    settings = {key: options[key] for key in ("inject", "inject_weight", "kl_budget", "granularity", "steps", "seed")}
    return distiller.learn(method.scale, donor=donor, state=state, learning_rate=method.learning_rate, **settings)


def _questions(recipe: Recipe) -> tuple[list[Question], list[Question], list[Question]]:
    """Calibration, held-out and text questions of a FRISM recipe; raises DataError naming file and line."""
    from vlmgraft.hf.data import load_questions

    method = _frism(recipe)
    calibration = method.calibration
    asked = load_questions(calibration.data, need_images=True, limit=calibration.samples + calibration.held_out)
    text = load_questions(method.questions) if method.inject == "donor" and method.questions else []
    return asked[: calibration.samples], asked[calibration.samples :], text


def _check_inputs(recipe: Recipe, alignment: Alignment) -> None:
    """Before hours of work: the question files can be read, and no weight that takes part is NaN or infinite."""
    import torch

    from vlmgraft.checkpoint.reader import Reader

    _questions(recipe)
    for key in ("vlm", "donor", "donor_base"):
        checkpoint = getattr(alignment, key)
        with Reader(checkpoint) as reader:
            for tensor in alignment.merged:
                for name in (tensor.name,) if key == "vlm" else getattr(tensor, key).names:
                    if not torch.isfinite(reader.tensor(name)).all():
                        raise WeightsError(f"{name} in {checkpoint.tensors[name].file} ({key}): holds NaN or infinity")
