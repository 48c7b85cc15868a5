"""A gates folder as rows of a report, read without torch."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import TypeAdapter
from safetensors import SafetensorError

from vlmgraft.errors import CheckpointError
from vlmgraft.report import schemas
from vlmgraft.storage.jsonl import read_json, read_rows

BINS = 16
_IN_LAYER = re.compile(r"layers\.(\d+)\.(?:.*\.)?(\w+)$")


def layer_and_projection(name: str) -> tuple[int, str] | None:
    """Layer and projection of a tensor's name, such as (3, "q_proj"); None outside the layers."""
    match = _IN_LAYER.search(name.removesuffix(".weight"))
    return (int(match[1]), match[2]) if match else None


@dataclass(frozen=True)
class GatedRun:
    """One gates folder: its settings, its training log, and per matrix how far its gates are open.

    matrices: rows with layer, projection, number of directions and mean openness; mean and standard deviation of the
    openness by sixteenth of the directions (largest singular values first); and, if the factors lie beside the gates,
    the share of the matrix's energy that is injected.
    """

    folder: Path
    settings: Mapping[str, Any]
    log: list[dict[str, Any]]
    matrices: list[dict[str, Any]]
    histogram: list[int]


def read_gates(folder: Path) -> GatedRun:
    """A gates folder as rows, read without torch; raises CheckpointError if the folder is incomplete."""
    from safetensors.numpy import load_file

    settings, file = read_json(folder / "gates.json", TypeAdapter(schemas.GateSettings)), folder / "gates.safetensors"
    try:
        logits = load_file(file)
    except (OSError, SafetensorError, TypeError, AttributeError) as error:  # the last two: a dtype that numpy lacks
        raise CheckpointError(f"{file}: not of a complete gates folder ({error}); learn the gates again") from error
    for name, value in logits.items():
        if value.dtype != np.float32 or value.ndim not in (1, 2) or not value.size or np.isnan(value).any():
            raise CheckpointError(f"{file}: {name} is {value.dtype} {list(value.shape)}, or NaN; learn the gates again")
    log = folder / "training.jsonl"
    opened = {name: 1 / (1 + np.exp(-value.astype(np.float64))) for name, value in logits.items()}
    every = np.concatenate([value.ravel() for value in opened.values()]) if opened else np.zeros(0)
    factors = folder.parent / "factors"
    return GatedRun(
        folder,
        settings,
        list(read_rows(log, TypeAdapter(schemas.Step))) if log.is_file() else [],
        [_matrix(name, value, factors / f"{name}.safetensors") for name, value in opened.items()],
        np.histogram(every, bins=20, range=(0, 1))[0].tolist(),
    )


def _matrix(name: str, opened: np.ndarray, factors: Path) -> dict[str, Any]:
    at = layer_and_projection(name)
    flat = opened.ravel()
    parts = np.array_split(opened, BINS, axis=-1)
    row: dict[str, Any] = {
        "name": name,
        "layer": at[0] if at else None,
        "projection": at[1] if at else name,
        "directions": int(flat.size),
        "open": float(flat.mean()),
        "above_half": float((flat > 0.5).mean()),
        "by_rank": [float(part.mean()) if part.size else None for part in parts],
        "spread": [float(part.std()) if part.size else None for part in parts],
        "injected": None,
    }
    s = _singular_values(factors)
    if s is not None and s.shape == opened.shape and float((s**2).sum()) > 0:
        row["injected"] = float(((opened * s) ** 2).sum() / (s**2).sum())
    return row


def _singular_values(path: Path) -> np.ndarray | None:
    """The `s` of a file of factors, None without the file; U and Vh are not read."""
    if not path.is_file():
        return None
    from safetensors import safe_open

    try:
        with safe_open(path, framework="numpy") as file:
            return np.asarray(file.get_tensor("s"), dtype=np.float64)
    except (OSError, SafetensorError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path}: no factors of this matrix ({error}); run decompose --resume") from error
