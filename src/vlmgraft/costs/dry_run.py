"""`merge --dry-run`: the predicted cost of a merge by stage, and a check of every input that it will need.

Nothing is written. For a model on the hub only small files are read: configs, tokenizer, and headers by range requests.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vlmgraft.alignment import Alignment
from vlmgraft.checkpoint.hub import is_hub_id, split_id
from vlmgraft.costs.gate_stages import Faults, StageCost, gated_stages
from vlmgraft.errors import OutputError
from vlmgraft.methods.frism import GatedMethod
from vlmgraft.recipe.model import Recipe
from vlmgraft.recipe.resolve import Plan, RecipeSource, pair, plan, read_recipe
from vlmgraft.storage.outputs import free_space, refuse_output, refuse_place


@dataclass(frozen=True)
class DryRun:
    """Predicted cost and faults of a merge. device: where `stages` are predicted to run. faults: what would make the
    merge fail, each with a remedy. notes: choices for this device, and the share of ‖τ‖² that the rank keeps."""

    plan: Plan
    device: str
    stages: tuple[StageCost, ...]
    faults: tuple[str, ...]
    notes: tuple[str, ...] = ()


def dry_run(
    recipe: RecipeSource,
    out: str | Path | None = None,
    workdir: str | Path | None = None,
    *,
    overrides: Sequence[str] = (),
    tell: Callable[[str], object] = lambda fault: None,
) -> DryRun:
    """Plan a merge and check everything that it will need.

    Args:
        recipe, out, workdir, overrides: as `merge` takes them; without `out` folders and disks are not checked.
        tell: is called with every fault as it is found, before slower checks.
    Raises:
        CheckpointError, AlignmentError, RecipeError: the models do not pair, so that there is nothing to plan.
    """
    recipe = read_recipe(recipe, overrides)
    out, workdir = Path(out) if out else None, Path(workdir) if workdir else None
    alignment = pair(recipe, headers_only=True)
    merge_plan, faults = plan(recipe, alignment), Faults(tell)
    method = recipe.method
    work = workdir or (out.with_name(f".{out.name}.work") if out else None)
    downloads = [_download(key, getattr(recipe, key), alignment) for key in ("vlm", "donor", "donor_base", "vlm_base")]
    stages = [stage for stage in downloads if stage is not None]
    device = "this machine's CPU"
    notes: list[str] = []
    if isinstance(method, GatedMethod):
        priced, device, notes = gated_stages(recipe, method, alignment, work, faults)
        stages += priced
    else:
        cost = merge_plan.cost
        if cost is not None:
            stages.append(StageCost("write", cost.seconds, 0, cost.memory, cost.written))
    if out is not None and work is not None:
        _places(recipe, alignment, out, work, stages, faults)
    return DryRun(merge_plan, device, tuple(stages), tuple(faults.texts), tuple(notes))


def _download(key: str, source: str | None, alignment: Alignment) -> StageCost | None:
    """The download of files of a hub model that are not cached yet, at 100 MB/s."""
    checkpoint = getattr(alignment, key)
    if source is None or checkpoint is None or not is_hub_id(source):
        return None
    from huggingface_hub import try_to_load_from_cache

    name, revision = split_id(source)
    sizes = dict.fromkeys(checkpoint.files, 0)
    for info in checkpoint.tensors.values():
        sizes[info.file] += info.nbytes
    cached = {file: isinstance(try_to_load_from_cache(name, file.name, revision=revision), str) for file in sizes}
    missing = sum(size for file, size in sizes.items() if not cached[file])
    done = f"{sum(cached.values())} of {len(sizes)} files are in the cache" if any(cached.values()) else ""
    return StageCost(f"download {key}", missing / 1e8, 0, 0, missing, done)


def _places(
    recipe: Recipe, alignment: Alignment, out: Path, work: Path, stages: Sequence[StageCost], faults: Faults
) -> None:
    """Check that `out` and the work folder may be created and written, and that their disk has space."""
    inputs = [checkpoint.path for checkpoint in alignment.opened.values()]
    checks: list[Callable[[], Any]] = [
        lambda: refuse_output(out, inputs),
        lambda: refuse_place(work, inputs),
        lambda: _apart(work, out),
        lambda: _writable(out),
        lambda: _writable(work),
        lambda: free_space(out, sum(stage.disk for stage in stages if not stage.name.startswith("download"))),
    ]
    for check in checks:
        with faults.collected():
            check()


def _apart(work: Path, out: Path) -> None:
    """Raise OutputError if the work folder is inside the output, which appears only when it is complete."""
    if out.resolve() in (work.resolve(), *work.resolve().parents):
        raise OutputError(f"--workdir {work}: lies inside --out {out}; choose a folder beside it")


def _writable(path: Path) -> None:
    """Raise OutputError if the user may not create `path`."""
    parent = next(folder for folder in path.resolve().parents if folder.exists())
    if not os.access(parent, os.W_OK | os.X_OK):
        raise OutputError(f"{path}: {parent} may not be written by this user; choose another folder, or ask for access")
