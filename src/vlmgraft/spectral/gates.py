"""Gates over singular directions: the result of FRISM's second stage, in memory and as a folder.

A folder holds `gates.safetensors` (VLM tensor name on disk → float32 logits g [r]), `gates.json` (scale λ, how the
gates were made, the digest of the factors they belong to, versions), `training.jsonl` (one row per logged step) and
`receipt.json` (a digest of every byte).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from vlmgraft.checkpoint.digests import RECEIPT
from vlmgraft.checkpoint.receipts import write_receipt
from vlmgraft.checkpoint.saving import save_tensors
from vlmgraft.durable import FOREIGN
from vlmgraft.errors import CheckpointError, OutputError
from vlmgraft.publishing import new_folder
from vlmgraft.records import read_rows, write_json, write_rows

HISTOGRAM_BINS = 10
FILES = ("gates.safetensors", "gates.json", "training.jsonl", RECEIPT)


@dataclass(frozen=True)
class Gates:
    """Gate logits g per tensor; W(g) = W_vlm + λ U diag(σ(g) ⊙ s) Vh.

    logits: float32 on the CPU, one per kept singular direction, [experts, r] for fused experts. scale: λ. settings: how
    they were learned. log: rows of the training log. factors: digest of the factor store they belong to, if it has one.
    """

    logits: Mapping[str, Float[Tensor, " r"]]
    scale: float
    settings: Mapping[str, Any] = field(default_factory=dict)
    log: tuple[Mapping[str, Any], ...] = ()
    factors: str | None = None

    def open(self, name: str) -> Float[Tensor, " r"]:
        """σ(g): how far each direction is open, 0 to 1."""
        return self.logits[name].sigmoid()

    def spectrum(self, name: str, s: Float[Tensor, " r"]) -> Float[Tensor, " r"]:
        """λ σ(g) ⊙ s in float32, on the device of s; raises CheckpointError when the lengths differ."""
        if self.logits[name].shape != s.shape:
            raise CheckpointError(
                f"{name}: {len(self.logits[name])} gates for {len(s)} directions; these gates belong to other factors"
            )
        return self.scale * self.open(name).to(s.device) * s.float()

    def save(self, folder: Path) -> None:
        """Write the folder, in place of gates that are there; raises OutputError where it holds anything else."""
        others = sorted(path.name for path in folder.iterdir() if not _ours(path)) if folder.is_dir() else []
        if others:
            raise OutputError(f"{folder}: holds {others[0]}, which is not of gates; choose another folder")
        tensors = {name: value.contiguous() for name, value in self.logits.items()}
        with new_folder(folder, replace=True) as made:
            save_tensors(tensors, made / "gates.safetensors")
            write_rows(made / "training.jsonl", self.log)
            write_json(made / "gates.json", {"scale": self.scale, "factors": self.factors, **self.settings})
            write_receipt(made, {})


def load_gates(folder: str | Path) -> Gates:
    """Read a gates folder; raises CheckpointError when it is incomplete or unreadable."""
    folder = Path(folder)
    try:
        settings = json.loads((folder / "gates.json").read_text(encoding="utf-8"))
        logits = load_file(folder / "gates.safetensors")
        scale, factors = float(settings.pop("scale")), settings.pop("factors", None)
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise CheckpointError(f"{folder}: not a complete gates folder ({error}); learn the gates again") from error
    log = folder / "training.jsonl"
    return Gates(logits, scale, settings, tuple(read_rows(log)) if log.is_file() else (), factors)


def unfinished(folder: Path) -> bool:
    """Whether `folder` holds gates without their settings, as kills left them in an earlier version, and no more."""
    return folder.is_dir() and not (folder / "gates.json").exists() and all(map(_ours, folder.iterdir()))


def _ours(path: Path) -> bool:
    return path.name in FILES or FOREIGN.fullmatch(path.name) is not None or path.name.endswith(".tmp")


def constant_gates(sizes: Mapping[str, int | tuple[int, ...]], logit: float, scale: float) -> Gates:
    """The same logit everywhere: 0 is task arithmetic at λ/2, +inf at λ, −inf the VLM itself."""
    shapes = {name: (size,) if isinstance(size, int) else tuple(size) for name, size in sizes.items()}
    return Gates({name: torch.full(shape, logit) for name, shape in shapes.items()}, scale)


def histogram(opened: Float[Tensor, " n"]) -> list[float]:
    """Shares of the gates in ten equal bins from closed to open."""
    counts = torch.histc(opened.detach().float().cpu(), bins=HISTOGRAM_BINS, min=0, max=1)
    return [round(float(count) / max(1, opened.numel()), 4) for count in counts]
