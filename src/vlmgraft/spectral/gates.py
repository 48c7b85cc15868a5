"""Gates over singular directions: the result of FRISM's second stage, in memory and as a folder.

A folder holds `gates.safetensors` (VLM tensor name on disk → float32 logits g [r]), `gates.json` (scale λ, how the
gates were made, the digest of the factors they belong to, versions), `training.jsonl` (one row per logged step) and
`receipt.json` (a digest of every byte).
"""

from __future__ import annotations

import math
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
from vlmgraft.records import read_json, read_rows, write_json, write_rows

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

    def check(self, factors: object) -> None:
        """Raise CheckpointError where these gates were made for other factors than a store that has a digest."""
        digest = getattr(factors, "digest", None)
        if None not in (digest, self.factors) and digest != self.factors:
            raise CheckpointError(
                f"{getattr(factors, 'folder', 'factors')}: the gates were made for factors {self.factors}, these are "
                f"{digest}; name those factors, or learn the gates again"
            )

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
    """Read a gates folder; raises CheckpointError when it is incomplete, unreadable, or holds what is no number."""
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
