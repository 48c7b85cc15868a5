"""The files beside the weights of a merged folder: the VLM's side files, the recipe, and the model card."""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml

from vlmgraft._version import __version__
from vlmgraft.alignment import Alignment
from vlmgraft.checkpoint.files import inside, load_json
from vlmgraft.checkpoint.hub import TEMPLATES
from vlmgraft.errors import CheckpointError
from vlmgraft.export.hub import HUB_ID
from vlmgraft.export.licence import merged_licence, stated_licence
from vlmgraft.storage.jsonl import write_json, write_text

SIDE_SUFFIXES = (".json", ".txt", ".jinja", ".model", ".py", ".tiktoken")
NOT_SIDE = (
    "model.safetensors.index.json", "pytorch_model.bin.index.json", "trainer_state.json", "receipt.json",
    "adapter_config.json",  # would make transformers look for adapter weights
)  # fmt: skip
REPLAY = """\
# `vlmgraft merge recipe.yaml --out DIR` replays this merge. `./NAME` was a local folder or file that is not published:
# say where yours is, such as --set vlm=FOLDER. Other paths are looked for from this file's folder too.
"""


def side_files(folder: Path) -> tuple[Path, ...]:
    """The files of a VLM's folder that a merged one takes over unchanged: config, generation config, tokenizer,
    processor, chat templates, remote code. Weights, training state, the card and the receipt are not among them.

    Raises:
        CheckpointError: one is a link out of the folder (and its repository in the hub's cache), whose target would be
            copied and published, or its name cannot be printed.
    """
    found = sorted((*folder.iterdir(), *folder.glob(TEMPLATES)))
    named = (path for path in found if path.suffix in SIDE_SUFFIXES and path.name not in NOT_SIDE)
    files = tuple(path for path in named if path.is_file() and not path.name.startswith("."))
    for path in files:
        if not inside(path, folder):
            raise CheckpointError(
                f"{path}: is a link to {path.resolve()}, outside its folder, and would be copied into the output; "
                "put the file itself there, or remove the link"
            )
        if not path.name.isprintable():
            raise CheckpointError(f"{folder}: holds a file named {path.name!r}, which would be copied; rename it")
    return files


def copy_side_files(folder: Path, out: Path) -> None:
    """Copy `side_files` to the same places in `out`."""
    for file in side_files(folder):
        target = out / file.relative_to(folder)
        target.parent.mkdir(exist_ok=True)
        shutil.copyfile(file, target)


def declare_dtype(config: Path, dtype: str) -> None:
    """Set the dtype in a config.json, at the top and wherever one is named, so that loaders do not round the
    weights."""

    def replaced(value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        return {key: dtype if key in ("dtype", "torch_dtype") else replaced(part) for key, part in value.items()}

    found = load_json(config)
    write_json(config, {"dtype": dtype} | replaced(found))


def model_card(
    recipe: Mapping[str, Any],
    alignment: Alignment,
    figures: Iterable[str] = (),
    divergence: Mapping[str, float] | None = None,
) -> str:
    """The README.md of a merged folder: hub metadata, what was merged and how, and the recipe that replays it.

    Args:
        recipe: as `vlmgraft.storage.portable` gives it, so that no path of this machine is published.
        figures: further lines of the summary, such as the time it took.
        divergence: measured divergences from the VLM by name, in nats per token.
    """
    method = recipe["method"]
    licences = {
        _label(recipe[key]): stated_licence(checkpoint.path)
        for key in ("vlm", "donor", "donor_base", "vlm_base")
        if recipe.get(key) and (checkpoint := getattr(alignment, key)) is not None
    }
    licence, about_licence = merged_licence(licences)
    header = yaml.safe_dump(_metadata(recipe, licence), sort_keys=False, allow_unicode=True)
    counts = Counter(tensor.verdict for tensor in alignment.tensors)
    groups = Counter(tensor.group for tensor in alignment.merged)
    summary = [
        f"- language model: {alignment.family}, {alignment.layers} decoder layers",
        f"- tensors: {counts['merged']} merged ({', '.join(f'{group} {n}' for group, n in sorted(groups.items()))}), "
        f"{counts['excluded']} excluded by the recipe, {counts['kept']} kept",
        "- names, shapes and dtypes are the VLM's; vision tower and projector are byte for byte the VLM's",
        *(f"- {note}" for note in alignment.notes),
        *(f"- {line}" for line in figures),
    ]
    text = yaml.safe_dump(dict(recipe), sort_keys=False, allow_unicode=True)
    return "\n\n".join(
        [
            f"---\n{header}---",
            f"# {_short(recipe['vlm'])} + {_short(recipe['donor'])}",
            "Weights of a text model merged into the language model of a vision-language model by "
            f"vlmgraft {__version__}, method `{method['name']}`.",
            _roles(recipe, licences),
            f"## Licence\n\n{about_licence}",
            "## What was done\n\n" + "\n".join(summary),
            *([_divergence(divergence)] if divergence else []),
            "`receipt.json` has the verdict and the reason for every tensor.",
            f"## Recipe\n\n```yaml\n{text}```\n",
        ]
    )


def write_model_card(
    folder: Path,
    recipe: Mapping[str, Any],
    alignment: Alignment,
    figures: Iterable[str] = (),
    divergence: Mapping[str, float] | None = None,
) -> Path:
    """Write the model card as README.md into `folder` and give its path."""
    path = folder / "README.md"
    write_text(path, model_card(recipe, alignment, figures, divergence))
    return path


def _metadata(recipe: Mapping[str, Any], licence: Mapping[str, str]) -> dict[str, Any]:
    """The card's YAML header. Only hub ids are named as base models and data sets: a path means nothing to others."""
    models = [recipe.get(key) for key in ("vlm", "donor", "donor_base", "vlm_base")]
    models += [model for further in recipe.get("more_donors", ()) for model in further.values()]
    bases = list(dict.fromkeys(name for model in models if model and (name := _hub_name(str(model)))))
    calibration = recipe["method"].get("calibration") or {}
    data = _hub_name(str(calibration.get("data", "")).partition(":")[0])
    return {
        **licence,
        "library_name": "transformers",
        "pipeline_tag": "image-text-to-text",
        **({"base_model": bases, "base_model_relation": "merge"} if bases else {}),
        **({"datasets": [data]} if data else {}),
        "tags": ["vlmgraft", "merge", "model-merging", recipe["method"]["name"]],
    }


def _hub_name(model: str) -> str | None:
    """The hub id without its revision, or None for a local file or folder."""
    name = model.partition("@")[0]
    return name if HUB_ID.fullmatch(name) and not Path(model).exists() else None


def _label(model: str) -> str:
    """A model as the card names it: its hub id, or the name of its folder."""
    return model if _hub_name(model) else _short(model)


def _short(model: str) -> str:
    return model.rstrip("/").rsplit("/", 1)[-1]


def _roles(recipe: Mapping[str, Any], licences: Mapping[str, str | None]) -> str:
    """The table of models."""
    what = {"vlm": "VLM", "donor": "donor", "donor_base": "donor's base", "vlm_base": "VLM's base"}
    labels = {key: _label(recipe[key]) for key in what if recipe.get(key)}
    rows = [f"| {what[key]} | `{label}` | {licences.get(label) or 'not stated'} |" for key, label in labels.items()]
    return "\n".join(["| role | model | licence |", "|---|---|---|", *rows])


def _divergence(divergence: Mapping[str, float]) -> str:
    """The table of measured divergences from the VLM."""
    rows = [f"| {name} | {value:.4g} |" for name, value in divergence.items()]
    return "\n".join(["## Divergence from the VLM", "", "| measured | nats per token |", "|---|---|", *rows])
