"""What goes beside the weights of a merged folder, and to the hub: side files, model card, push."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml

from vlmgraft import __version__
from vlmgraft.alignment import AlignedTensor, Alignment
from vlmgraft.checkpoint.files import inside
from vlmgraft.errors import CheckpointError, InputError, OutputError
from vlmgraft.records import write_text

SIDE_SUFFIXES = (".json", ".txt", ".jinja", ".model", ".py", ".tiktoken")
NOT_SIDE = ("model.safetensors.index.json", "pytorch_model.bin.index.json", "trainer_state.json", "receipt.json")
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


def side_files(folder: Path) -> tuple[Path, ...]:
    """The files of a VLM's folder that a merged one takes over unchanged: config, generation config, tokenizer,
    processor, chat template, remote code. Weights, training state, the card and the receipt are not among them.

    Raises:
        CheckpointError: one is a link out of the folder (and its repository in the hub's cache), whose target would be
            copied and published, or its name cannot be printed.
    """
    named = (path for path in sorted(folder.iterdir()) if path.suffix in SIDE_SUFFIXES and path.name not in NOT_SIDE)
    found = tuple(path for path in named if path.is_file() and not path.name.startswith("."))
    for path in found:
        if not inside(path, folder):
            raise CheckpointError(
                f"{path}: is a link to {path.resolve()}, outside its folder, and would be copied into the output; "
                "put the file itself there, or remove the link"
            )
        if not path.name.isprintable():
            raise CheckpointError(f"{folder}: holds a file named {path.name!r}, which would be copied; rename it")
    return found


def model_card(recipe: Mapping[str, Any], alignment: Alignment, figures: Iterable[str] = ()) -> str:
    """The README.md of a merged folder: hub metadata, what was merged and how, and the recipe that replays it.

    Args:
        recipe: as `vlmgraft.recipe.dump_recipe` gives it.
        figures: further lines of the summary, such as the time it took.
    """
    method = recipe["method"]
    header = yaml.safe_dump(_metadata(recipe), sort_keys=False, allow_unicode=True)
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
    return (
        f"---\n{header}---\n\n# {_short(recipe['vlm'])} + {_short(recipe['donor'])}\n\n"
        f"Weights of a text model merged into the language model of a vision-language model by "
        f"vlmgraft {__version__}, method `{method['name']}`.\n\n"
        + "\n".join(_roles(recipe))
        + "\n\n## What was done\n\n"
        + "\n".join(summary)
        + f"\n\n`receipt.json` has the verdict and the reason for every tensor.\n\n## Recipe\n\n```yaml\n{text}```\n"
    )


def write_model_card(
    folder: Path, recipe: Mapping[str, Any], alignment: Alignment, figures: Iterable[str] = ()
) -> Path:
    """Write the model card as README.md into `folder` and give its path."""
    path = folder / "README.md"
    write_text(path, model_card(recipe, alignment, figures))
    return path


def push_to_hub(
    folder: Path, name: str, *, private: bool = True, token: str | None = None, revision: str | None = None
) -> str:
    """Upload a finished folder to the hub as `organisation/name` and give the address of the commit.

    Raises:
        InputError: the name is no hub id, the folder is not a finished checkpoint, or the hub refuses.
    """
    if not _HUB_ID.fullmatch(name):
        raise InputError(f"{name!r}: a hub id is organisation/name")
    _refuse_unfinished(folder)
    from huggingface_hub import HfApi, errors

    api = HfApi(token=token)
    try:
        api.create_repo(name, private=private, exist_ok=True)
        message = f"Upload with vlmgraft {__version__}"
        return str(
            api.upload_folder(repo_id=name, folder_path=folder, commit_message=message, revision=revision).commit_url
        )
    except (OSError, *errors.HfHubHTTPError.__bases__) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InputError(
            f"{name}: the hub refused or cannot be reached ({reason}); log in with `hf auth login`"
        ) from None


def _refuse_unfinished(folder: Path) -> None:
    """Refuse to push a folder without a config or with a shard that its index names missing."""
    for name in ("config.json", "README.md"):
        if not (folder / name).is_file():
            raise OutputError(f"{folder}: no {name}; push the folder that `vlmgraft merge --out` wrote")
    index = folder / "model.safetensors.index.json"
    names = set(json.loads(index.read_text())["weight_map"].values()) if index.is_file() else {"model.safetensors"}
    missing = sorted(name for name in names if not (folder / name).is_file())
    if missing:
        raise OutputError(f"{folder}: {missing[0]} is missing; the checkpoint is not finished")


def _metadata(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """The card's YAML header. Only hub ids are named as base models: a local path means nothing to others."""
    models = [recipe.get(key) for key in ("vlm", "donor", "donor_base", "vlm_base")]
    models += [one for further in recipe.get("more_donors", ()) for one in further.values()]
    bases = list(dict.fromkeys(name for model in models if model and (name := _hub_name(str(model)))))
    relation = {"base_model": bases, "base_model_relation": "merge"} if bases else {}
    tags = ["vlmgraft", "merge", "model-merging", recipe["method"]["name"]]
    return {"library_name": "transformers", "pipeline_tag": "image-text-to-text", **relation, "tags": tags}


def _hub_name(model: str) -> str | None:
    """The hub id without its revision, or None for a local folder."""
    name = model.partition("@")[0]
    return name if _HUB_ID.fullmatch(name) and not Path(model).exists() else None


def _short(model: str) -> str:
    return model.rstrip("/").rsplit("/", 1)[-1]


def _roles(recipe: Mapping[str, Any]) -> list[str]:
    """The table of models."""
    what = {"vlm": "VLM", "donor": "donor", "donor_base": "donor's base", "vlm_base": "VLM's base"}
    rows = [f"| {label} | `{recipe[key]}` |" for key, label in what.items() if recipe.get(key)]
    return ["| role | model |", "|---|---|", *rows]


def tensor_row(tensor: AlignedTensor) -> dict[str, Any]:
    """One tensor's verdict as JSON values, for `inspect --json` and the receipt."""
    sources = {key: getattr(tensor, key) for key in ("donor", "donor_base", "vlm_base")}
    return {
        "name": tensor.name,
        "verdict": tensor.verdict,
        "reason": tensor.reason,
        "role": tensor.role,
        "layer": tensor.layer,
        "group": tensor.group,
        **{key: list(source.names) for key, source in sources.items() if source is not None},
    }
