"""A folder with the lab's models and one thing in it that lies; and what must be said about it."""

from __future__ import annotations

import json
import os
import shutil
import socket
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
F32 = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}


class Place:
    """base, vlm and donor as links to the lab's; `copy` puts small files of one in a folder of its own."""

    def __init__(self, folder: Path, trio: Path) -> None:
        self.folder, self.trio = folder, trio
        for name in ("base", "vlm", "donor"):
            (folder / name).symlink_to(trio / name)

    def own(self, name: str, *, weights: bool = False) -> Path:
        """A copy of one model's folder, without its weights or with them."""
        made = self.folder / name
        made.unlink()
        made.mkdir()
        for file in (self.trio / name).iterdir():
            if file.name != WEIGHTS:
                shutil.copy(file, made / file.name)
        if weights:
            os.link(self.trio / name / WEIGHTS, made / WEIGHTS) if _same_disk(self.trio, made) else shutil.copy(
                self.trio / name / WEIGHTS, made / WEIGHTS
            )
        return made

    def recipe(self, **changes: Any) -> Path:
        """A recipe of the three models."""
        models = {key: str(self.folder / name) for key, name in MODELS.items()}
        return self.text(yaml.safe_dump({**models, "method": {"name": "task_arithmetic"}, **changes}))

    def text(self, text: str | bytes) -> Path:
        """A recipe file of this text."""
        file = self.folder / "recipe.yaml"
        file.write_bytes(text if isinstance(text, bytes) else text.encode())
        return file

    def questions(self, *rows: object, name: str = "q.jsonl") -> Path:
        """A file of lines: texts and bytes as they are, others as JSON."""
        lines = [
            row if isinstance(row, bytes) else row.encode() if isinstance(row, str) else _json(row) for row in rows
        ]
        (self.folder / name).write_bytes(b"\n".join(lines))
        return self.folder / name

    def calibrated(self, file: Path) -> Path:
        """A FRISM recipe that learns from `file`."""
        learned = {"data": str(file), "samples": 2, "max_new_tokens": 4}
        return self.recipe(method={"name": "frism", "steps": 0, "inject_weight": 0.1, "calibration": learned})


MODELS = {"vlm": "vlm", "donor": "donor", "donor_base": "base"}


@dataclass(frozen=True)
class Case:
    """prepare: makes the lie and gives the arguments of the command. file, field: what the message must name."""

    name: str
    prepare: Callable[[Place], list[str | Path]]
    file: str
    field: str


def _same_disk(one: Path, other: Path) -> bool:
    return one.stat().st_dev == other.stat().st_dev


def _json(value: object) -> bytes:
    return json.dumps(value).encode()


def merge(place: Place, recipe: Path | None = None) -> list[str | Path]:
    """Arguments of a merge."""
    return ["merge", recipe or place.recipe(), "--out", place.folder / "out", "--quiet"]


def evaluate(place: Place, data: Path, model: str = "vlm") -> list[str | Path]:
    """Arguments of an evaluation."""
    return ["evaluate", place.folder / model, "--data", data, "--out", place.folder / "out", "--quiet"]


def tune(place: Place, data: Path) -> list[str | Path]:
    """Arguments of a fine-tuning."""
    recipe = {"vlm": str(place.folder / "vlm"), "prior": {"mode": "none"}, "data": {"train": str(data)}}
    place.text(yaml.safe_dump({**recipe, "train": {"max_steps": 1, "use_cpu": True}}))
    return ["tune", place.folder / "recipe.yaml", "--out", place.folder / "out"]


def safetensors(folder: Path, header: object, data: bytes = b"1234", name: str = WEIGHTS) -> None:
    """A file with this header: bytes and texts as they are, others as JSON."""
    text = header if isinstance(header, bytes) else header.encode() if isinstance(header, str) else _json(header)
    (folder / name).write_bytes(len(text).to_bytes(8, "little") + text + data)


def put_special(path: Path, kind: str) -> None:
    """Something that is no file under a file's name."""
    path.unlink(missing_ok=True)
    if kind == "FIFO":
        os.mkfifo(path)
    elif kind == "device":
        path.symlink_to("/dev/zero")
    elif kind == "folder":
        path.mkdir()
    elif kind == "link":
        path.symlink_to("nowhere")
    else:
        before = Path.cwd()
        os.chdir(path.parent)  # a socket's path is short
        try:
            with socket.socket(socket.AF_UNIX) as made:
                made.bind(path.name)
        finally:
            os.chdir(before)
