"""Gates as a folder: written, read and checked.

It holds `gates.safetensors` (VLM tensor name on disk → float32 logits g [r], of fused experts [experts, r]),
`gates.json` (scale λ, how the gates were made, the digest of the factors they belong to), `training.jsonl` (one row per
logged step) and `receipt.json` (a digest of every byte).
"""

from __future__ import annotations

import math
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from vlmgraft.checkpoint.digests import RECEIPT, write_receipt
from vlmgraft.checkpoint.writer import save_tensors
from vlmgraft.errors import CheckpointError, OutputError
from vlmgraft.spectral.gates import Gates
from vlmgraft.storage.files import FOREIGN
from vlmgraft.storage.jsonl import read_json, read_rows, write_json, write_rows
from vlmgraft.storage.publish import new_folder

FILES = ("gates.safetensors", "gates.json", "training.jsonl", RECEIPT)


def save_gates(gates: Gates, folder: Path) -> None:
    """Write the folder and replace gates in it; raises OutputError if it holds anything else."""
    foreign = sorted(path.name for path in folder.iterdir() if not _is_ours(path)) if folder.is_dir() else []
    if foreign:
        raise OutputError(f"{folder}: holds {foreign[0]}, which is not of gates; choose another folder")
    tensors = {name: value.contiguous() for name, value in gates.logits.items()}
    with new_folder(folder, replace=True) as partial:
        save_tensors(tensors, partial / "gates.safetensors")
        write_rows(partial / "training.jsonl", gates.log)
        write_json(partial / "gates.json", {"scale": gates.scale, "factors": gates.factors, **gates.settings})
        write_receipt(partial, {})


def load_gates(folder: str | Path) -> Gates:
    """Read a gates folder; raises CheckpointError if it is incomplete, unreadable, or holds NaN or a bad scale."""
    folder = Path(folder)
    log, file = folder / "training.jsonl", folder / "gates.json"
    try:
        settings = read_json(file)
        scale, factors = settings.pop("scale"), settings.pop("factors", None)
        if type(scale) not in (int, float) or not math.isfinite(scale) or not isinstance(factors, str | None):
            raise ValueError(f"scale {scale!r:.60} or factors {factors!r:.60}")
        rows = tuple(read_rows(log)) if log.is_file() else ()
        file = folder / "gates.safetensors"
        logits = load_file(file)
        for name, value in logits.items():
            if value.dtype != torch.float32 or value.ndim not in (1, 2) or value.isnan().any():
                raise ValueError(f"{name} is {value.dtype} {list(value.shape)}, or holds NaN")
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise CheckpointError(f"{file}: not of a complete gates folder ({error}); learn the gates again") from error
    return Gates(logits, float(scale), settings, rows, factors)


def _is_ours(path: Path) -> bool:
    return path.name in FILES or FOREIGN.fullmatch(path.name) is not None or path.name.endswith(".tmp")
