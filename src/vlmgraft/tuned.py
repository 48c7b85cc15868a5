"""The finished folder of a fine-tuning: put together, given its name, and recognised again.

It holds the VLM's tensors under their names, shapes and dtypes (or the LoRA adapter), its side files, `recipe.yaml`,
`training.jsonl`, `drift.jsonl`, and `receipt.json` with a verdict for every tensor and a digest of every byte.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from vlmgraft import __version__
from vlmgraft.card import side_files
from vlmgraft.checkpoint.digests import RECEIPT
from vlmgraft.checkpoint.index import Checkpoint, open_checkpoint
from vlmgraft.checkpoint.reader import TORCH_DTYPES, Reader
from vlmgraft.checkpoint.receipts import seal_receipt, write_receipt
from vlmgraft.checkpoint.shards import TensorSpec
from vlmgraft.checkpoint.writer import Writer
from vlmgraft.errors import NumericalError, OutputError, RecipeError
from vlmgraft.merging.stream import fingerprint
from vlmgraft.publishing import new_folder
from vlmgraft.recipe.tune import TuneRecipe, dump_tune_recipe, load_tune_recipe, save_tune_recipe
from vlmgraft.records import read_rows, write_rows, write_text
from vlmgraft.training.drift_callback import LOG
from vlmgraft.training.prior_delta import Verdict

RECIPE, ROWS = "recipe.yaml", "training.jsonl"
SHARD = 5 * 10**9


@dataclass(frozen=True)
class Tuned:
    """What a fine-tuning left. verdicts: what the prior did with each tensor; log: the trainer's rows."""

    folder: Path
    steps: int
    loss: float
    verdicts: tuple[Verdict, ...]
    log: tuple[Mapping[str, Any], ...]


def finished(recipe: TuneRecipe, vlm: Checkpoint, out: Path) -> Tuned | None:
    """What `out` holds, if this very recipe finished it from these weights."""
    try:
        receipt = json.loads((out / RECEIPT).read_text(encoding="utf-8"))
        if load_tune_recipe(out / RECIPE) != recipe or receipt["inputs"] != fingerprint(vlm.files):
            return None
        verdicts = tuple(Verdict(**row) for row in receipt["prior"])
        return Tuned(out, receipt["steps"], receipt["train_loss"], verdicts, tuple(read_rows(out / ROWS)))
    except (OSError, ValueError, KeyError, TypeError, RecipeError):
        return None


def publish(recipe: TuneRecipe, vlm: Checkpoint, work: Path, tuned: Tuned, processor: Any) -> None:
    """Put the finished folder together and give it its name. processor: only if tokens were added."""
    saved, out = work / "saved", tuned.folder
    if recipe.lora is not None and not recipe.merge_adapter:
        with new_folder(out) as folder:
            ours = shutil.ignore_patterns("training_args.bin", "README.md")
            shutil.copytree(saved, folder, dirs_exist_ok=True, ignore=ours)
            _add_side_files(recipe, work, tuned, folder)
            write_receipt(folder, _receipt(recipe, tuned, vlm))
    else:
        made = open_checkpoint(saved)
        with Writer(out, _specs(vlm, made), SHARD) as writer:
            rows = list(_write(writer, vlm, made))
            for file in side_files(vlm.path):
                shutil.copyfile(file, writer.folder / file.name)
            if processor is not None:
                processor.save_pretrained(writer.folder)
                shutil.copyfile(saved / "config.json", writer.folder / "config.json")
            _add_side_files(recipe, work, tuned, writer.folder)
            files = [asdict(file) for file in writer.files()]
            seal_receipt(writer.folder, {**_receipt(recipe, tuned, vlm), "tensors": rows, "files": files})


def _add_side_files(recipe: TuneRecipe, work: Path, tuned: Tuned, folder: Path) -> None:
    """The recipe that replays it, the logs, and a card."""
    save_tune_recipe(recipe, folder / RECIPE)
    write_rows(folder / ROWS, tuned.log)
    write_text(folder / "README.md", _card(recipe, tuned))
    if (work / LOG).is_file():
        shutil.copyfile(work / LOG, folder / LOG)
    if (work / "trainer" / "runs").is_dir():
        shutil.copytree(work / "trainer" / "runs", folder / "runs", dirs_exist_ok=True)


def _specs(vlm: Checkpoint, made: Checkpoint) -> list[TensorSpec]:
    """The VLM's tensors in its order and dtypes; the shapes are the trained ones (a vocabulary may have grown)."""
    extra = [name for name in made.tensors if name not in vlm.tensors]
    if extra:
        raise OutputError(f"{made.path}: the trained model has {extra[0]}, the VLM has not; its weights are left there")
    known = {**vlm.tensors, **made.tensors}
    return [TensorSpec(name, info.dtype, known[name].shape) for name, info in vlm.tensors.items()]


def _write(writer: Writer, vlm: Checkpoint, made: Checkpoint) -> Iterator[dict[str, Any]]:
    """Every tensor of the VLM: as trained, or as it was where the trainer saves none (a head tied to the embeddings is
    the trained embeddings). Gives its row of the receipt."""
    with Reader(vlm) as before, Reader(made) as after:
        for name, info in vlm.tensors.items():
            embeddings = next((other for other in made.tensors if other.endswith("embed_tokens.weight")), None)
            if name in made.tensors:
                tensor = after.tensor(name)
            elif name.endswith("lm_head.weight") and embeddings is not None:
                tensor = after.tensor(embeddings)
            else:
                tensor = before.tensor(name)
            cast = tensor.to(TORCH_DTYPES[info.dtype])
            if not torch.isfinite(cast).all():
                raise NumericalError(
                    f"{name}: NaN or infinity in {info.dtype} after training; nothing was published: lower the "
                    "learning rate and start again"
                )
            writer.write(name, cast)
            yield {"name": name, "dtype": info.dtype, "shape": list(cast.shape), "digest": writer.digest(name)}


def _receipt(recipe: TuneRecipe, tuned: Tuned, vlm: Checkpoint) -> dict[str, Any]:
    import transformers
    import trl

    versions = {"vlmgraft": __version__, "torch": torch.__version__}
    versions |= {"transformers": transformers.__version__, "trl": trl.__version__}
    facts: dict[str, Any] = {"steps": tuned.steps, "train_loss": tuned.loss, "versions": versions}
    facts["inputs"] = fingerprint(vlm.files)
    return {"recipe": dump_tune_recipe(recipe), **facts, "prior": [asdict(verdict) for verdict in tuned.verdicts]}


def _card(recipe: TuneRecipe, tuned: Tuned) -> str:
    """A short model card: what was tuned, towards what, on what."""
    prior = recipe.prior
    how = "supervised fine-tuning"
    if prior.mode != "none":
        how += f" with DRIFT's gradient prior ({prior.mode}, strength {prior.strength:g}) towards `{recipe.donor}`"
    pushed = sum(verdict.verdict == "pushed" for verdict in tuned.verdicts)
    return (
        "---\nlibrary_name: transformers\npipeline_tag: image-text-to-text\ntags: [vlmgraft, sft]\n---\n\n"
        f"# {tuned.folder.name}\n\n`{recipe.vlm}` after {how}: {tuned.steps} steps on `{recipe.data.train}`, mean loss "
        f"{tuned.loss:.4f}, {pushed} tensors pushed. `recipe.yaml` replays it with `vlmgraft tune`; `receipt.json` "
        "says what happened to each tensor.\n"
    )
