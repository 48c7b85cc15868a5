"""Traces of the lab's sums, and a recipe that trains on them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from vlmgraft.lab.exam import draw_exam, save_traces

STEPS = {"max_steps": 3, "learning_rate": 1e-3, "per_device_train_batch_size": 2, "use_cpu": True, "logging_steps": 1}


def write_traces(folder: Path) -> Path:
    """Six sums as a file of traces."""
    return save_traces(draw_exam(0, "train", {"sum": 6}), folder / "traces.jsonl")


def recipe_on(trio: Path, data: Path) -> dict[str, Any]:
    """A recipe of three steps."""
    places = {"vlm": str(trio / "vlm"), "donor": str(trio / "donor"), "donor_base": str(trio / "base")}
    return {**places, "data": {"train": str(data)}, "train": STEPS | {"disable_tqdm": True}}
