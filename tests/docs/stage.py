"""What stands in for large models and downloads where a page's blocks run: the lab's trio and files of its world."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from vlmgraft.lab import trio_path, world
from vlmgraft.lab.demo import QUICK, mixed
from vlmgraft.lab.exam import draw_exam, save_questions, save_traces

NAMES = {
    "Qwen/Qwen2.5-VL-7B-Instruct": "vlm",
    "deepseek-ai/DeepSeek-R1-Distill-Qwen-7B": "donor",
    "Qwen/Qwen2.5-Math-7B": "base",
    "Qwen/Qwen2.5-7B": "base",
    "vlm": "vlm",
    "donor": "donor",
    "trio": "",
}


def models(folder: Path) -> None:
    """The lab's models under the names that pages use."""
    for name, part in NAMES.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).symlink_to(trio_path() / part if part else trio_path())


def questions(folder: Path) -> None:
    """questions.jsonl: 24 questions about images. reasoning.jsonl: 8 text questions."""
    save_questions(_draw(dict.fromkeys(world.PERCEPTION, 6)), folder / "questions.jsonl")
    save_questions(_draw({"sum": 8}, as_image=False), folder / "reasoning.jsonl")


def traces(folder: Path) -> None:
    """traces.jsonl: four sums with images and answers."""
    save_traces(draw_exam(0, "train", {"sum": 4}), folder / "traces.jsonl")


def demo(folder: Path) -> None:
    """demo/data/ as `vlmgraft demo --quick` writes it."""
    each, data = QUICK.sizes.calibration // len(world.PERCEPTION), folder / "demo" / "data"
    save_questions(mixed(_draw(dict.fromkeys(world.PERCEPTION, each))), data / "calibration.jsonl")
    save_questions(_draw({"sum": QUICK.sizes.donor}, as_image=False), data / "questions.jsonl")


def merged(folder: Path) -> None:
    """merged: a folder that answers, here the VLM."""
    (folder / "merged").symlink_to(trio_path() / "vlm")


def _draw(sizes: dict[str, int], **more: bool) -> list:  # type: ignore[type-arg]
    return draw_exam(0, "calibration", sizes, **more).questions  # type: ignore[arg-type]


STAGES: dict[str, Callable[[Path], None]] = {"demo": demo, "merged": merged, "traces": traces}
"""What a page may ask for by `<!-- with: NAME -->`; models and questions are always there."""
