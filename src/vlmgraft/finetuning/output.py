"""The finished folder of a fine-tuning: assembled, published by rename, and recognised when a run is repeated.

It holds the VLM's tensors under their names, shapes and dtypes (or the LoRA adapter), its side files, `recipe.yaml`,
`training.jsonl`, `drift.jsonl`, and `receipt.json` with a verdict for every tensor and a digest of every byte.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from pydantic import TypeAdapter, ValidationError

from vlmgraft._version import __version__
from vlmgraft.checkpoint.digests import RECEIPT, seal_receipt, write_receipt
from vlmgraft.checkpoint.handles import TORCH_DTYPES
from vlmgraft.checkpoint.header import TensorSpec
from vlmgraft.checkpoint.index import Checkpoint, open_checkpoint
from vlmgraft.checkpoint.reader import Reader
from vlmgraft.checkpoint.writer import Writer
from vlmgraft.errors import DamagedError, NumericalError, OutputError, RecipeError
from vlmgraft.export.card import copy_side_files
from vlmgraft.finetuning.callback import LOG
from vlmgraft.finetuning.prior import PushVerdict
from vlmgraft.merging.receipt import fingerprint
from vlmgraft.recipe.source import read_mapping
from vlmgraft.recipe.tune import TuneRecipe, dump_tune_recipe
from vlmgraft.storage.jsonl import read_json, read_rows, write_rows, write_text
from vlmgraft.storage.portable import portable
from vlmgraft.storage.publish import new_folder

RECIPE, ROWS, CONTENTS = "recipe.yaml", "training.jsonl", "contents.json"
SHARD = 5 * 10**9


@dataclass(frozen=True)
class Tuned:
    """The result of a fine-tuning. verdicts: what the prior did with each tensor; log: the trainer's rows."""

    folder: Path
    steps: int
    loss: float
    verdicts: tuple[PushVerdict, ...]
    log: tuple[Mapping[str, Any], ...]


@dataclass(frozen=True)
class _Receipt:
    """What is needed of receipt.json."""

    inputs: str
    contents: dict[str, str | None]
    steps: int
    train_loss: float
    prior: tuple[PushVerdict, ...]


def finished(recipe: TuneRecipe, vlm: Checkpoint, out: Path, contents: Mapping[str, str | None]) -> Tuned | None:
    """The result in `out` if this recipe finished it from these weights and traces, else None.

    contents: digests of everything that the recipe names by path.
    """
    try:
        receipt = TypeAdapter(_Receipt).validate_json((out / RECEIPT).read_bytes(), strict=True)
        written, log = read_mapping(out / RECIPE), tuple(read_rows(out / ROWS))
    except (OSError, ValidationError, RecipeError, DamagedError):
        return None
    if (written, receipt.inputs, receipt.contents) != (_written(recipe, out), fingerprint(vlm.files), contents):
        return None
    return Tuned(out, receipt.steps, receipt.train_loss, receipt.prior, log)


def publish(
    recipe: TuneRecipe,
    vlm: Checkpoint,
    work: Path,
    tuned: Tuned,
    processor: Any,
    sources: Mapping[str, Mapping[str, str]],
) -> None:
    """Assemble the finished folder and rename it to its place. processor: only if tokens were added. sources: digests
    of the tensors that the prior was made from."""
    saved, out = work / "saved", tuned.folder
    if recipe.lora is not None and not recipe.merge_adapter:
        with new_folder(out) as folder:
            ours = shutil.ignore_patterns("training_args.bin", "README.md")
            shutil.copytree(saved, folder, dirs_exist_ok=True, ignore=ours)
            _add_side_files(recipe, work, tuned, folder)
            write_receipt(folder, {**_receipt(recipe, work, tuned, vlm), "sources": sources})
    else:
        trained = open_checkpoint(saved)
        with Writer(out, _specs(vlm, trained), SHARD) as writer:
            rows = list(_write(writer, vlm, trained))
            copy_side_files(vlm.path, writer.folder)
            if processor is not None:
                processor.save_pretrained(writer.folder)
                shutil.copyfile(saved / "config.json", writer.folder / "config.json")
            _add_side_files(recipe, work, tuned, writer.folder)
            files = [asdict(file) for file in writer.files()]
            facts = {**_receipt(recipe, work, tuned, vlm), "sources": sources}
            seal_receipt(writer.folder, {**facts, "tensors": rows, "files": files})


def _add_side_files(recipe: TuneRecipe, work: Path, tuned: Tuned, folder: Path) -> None:
    """Add the recipe that reproduces the folder, the logs, and a model card."""
    plain = _written(recipe, tuned.folder)
    write_text(folder / RECIPE, yaml.safe_dump(plain, sort_keys=False, allow_unicode=True))
    write_rows(folder / ROWS, tuned.log)
    write_text(folder / "README.md", _card(recipe, tuned))
    if (work / LOG).is_file():
        shutil.copyfile(work / LOG, folder / LOG)
    if (work / "trainer" / "runs").is_dir():
        shutil.copytree(work / "trainer" / "runs", folder / "runs", dirs_exist_ok=True)


def _written(recipe: TuneRecipe, out: Path) -> dict[str, Any]:
    """The recipe as `out` holds it."""
    plain: dict[str, Any] = portable(dump_tune_recipe(recipe), out)
    return plain


def _specs(vlm: Checkpoint, trained: Checkpoint) -> list[TensorSpec]:
    """The VLM's tensors in its order and dtypes; the shapes are the trained ones (a vocabulary may have grown)."""
    extra = [name for name in trained.tensors if name not in vlm.tensors]
    if extra:
        raise OutputError(
            f"{trained.path}: the trained model has {extra[0]}, the VLM has not; its weights are left there"
        )
    merged = {**vlm.tensors, **trained.tensors}
    return [TensorSpec(name, info.dtype, merged[name].shape) for name, info in vlm.tensors.items()]


def _write(writer: Writer, vlm: Checkpoint, trained: Checkpoint) -> Iterator[dict[str, Any]]:
    """Write every tensor of the VLM as trained, or unchanged if the trainer saves none (a head tied to the embeddings
    is the trained embeddings). Yields its row of the receipt."""
    with Reader(vlm) as before, Reader(trained) as after:
        for name, info in vlm.tensors.items():
            embeddings = next((key for key in trained.tensors if key.endswith("embed_tokens.weight")), None)
            if name in trained.tensors:
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


def _receipt(recipe: TuneRecipe, work: Path, tuned: Tuned, vlm: Checkpoint) -> dict[str, Any]:
    import transformers
    import trl

    versions = {"vlmgraft": __version__, "torch": torch.__version__}
    versions |= {"transformers": transformers.__version__, "trl": trl.__version__}
    facts: dict[str, Any] = {"steps": tuned.steps, "train_loss": tuned.loss, "versions": versions}
    facts |= {"inputs": fingerprint(vlm.files), "contents": read_json(work / CONTENTS)}
    verdicts = [asdict(verdict) for verdict in tuned.verdicts]
    return {"recipe": _written(recipe, tuned.folder), **facts, "prior": verdicts}


def _card(recipe: TuneRecipe, tuned: Tuned) -> str:
    """A short model card: which VLM was tuned, towards which donor, on which data."""
    prior, written = recipe.prior, _written(recipe, tuned.folder)
    how = "supervised fine-tuning"
    if prior.mode != "none":
        how += f" with DRIFT's gradient prior ({prior.mode}, strength {prior.strength:g}) towards `{written['donor']}`"
    pushed = sum(verdict.verdict == "pushed" for verdict in tuned.verdicts)
    return (
        "---\nlibrary_name: transformers\npipeline_tag: image-text-to-text\ntags: [vlmgraft, sft]\n---\n\n"
        f"# {tuned.folder.name}\n\n`{written['vlm']}` after {how}: {tuned.steps} steps on "
        f"`{written['data']['train']}`, mean loss {tuned.loss:.4f}, {pushed} tensors pushed. "
        "`recipe.yaml` replays it with `vlmgraft tune`; `receipt.json` "
        "says what happened to each tensor.\n"
    )
