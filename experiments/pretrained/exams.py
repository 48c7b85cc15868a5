"""The trio's questions as files that `vlmgraft` reads: exams of two splits, calibration, prompts for a KL and for the
donor."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from experiments.pretrained import scenes
from experiments.pretrained.scenes import Example
from experiments.pretrained.stages import Trio
from vlmgraft.lab import world
from vlmgraft.storage.jsonl import write_rows

SIZES = {"exam": 300, "beyond": 100, "calibration": 384, "divergence": 300, "questions": 64, "traces": 500}


def write_exams(trio: Trio, sizes: dict[str, int] | None = None) -> Path:
    """Write `data/` under the seed's folder; finished files are left alone.

    validation.jsonl, test.jsonl: half sums, half perception, to `vlmgraft evaluate`. calibration.jsonl: unlabelled
    perception of the calibration split. divergence.jsonl: perception of the test split's handwriting on which no gate
    is learned. text-sums.jsonl, words.jsonl: unlabelled text questions for donor matching. plus.jsonl, minus.jsonl,
    told.jsonl: sums that no donor is tuned on (five numbers, differences), and the test's kind told in text.
    traces.jsonl: sums on pictures of the training split with their answers worked out, to `vlmgraft tune`.
    """
    counts, folder = {**SIZES, **(sizes or {})}, trio.folder / "data"
    plans: tuple[tuple[str, world.Split, int, bool], ...] = (
        ("validation", "validation", 12, True),
        ("test", "test", 13, True),
        ("calibration", "calibration", 14, False),
        ("divergence", "test", 15, False),
    )
    for name, split, stream, answered in plans:
        rng = trio.rng(stream)
        count = counts["exam" if answered else name]
        examples = [scenes.perception_example(rng) for _ in range(count)]
        examples += [scenes.sum_example(rng) for _ in range(count if answered else 0)]
        _write(folder / f"{name}.jsonl", examples, rng, split, [_answer(e) for e in examples] if answered else [])
    for stream, (name, draw) in enumerate({"plus": scenes.fifth_number, "minus": scenes.difference}.items(), 17):
        rng = trio.rng(stream)
        examples = [draw(rng) for _ in range(counts["beyond"])]
        _write(folder / f"{name}.jsonl", examples, rng, "test", [_answer(e) for e in examples])
    rng = trio.rng(19)
    text_sums = [scenes.sum_example(rng) for _ in range(counts["beyond"])]
    if not (folder / "told.jsonl").is_file():
        write_rows(
            folder / "told.jsonl",
            [{"id": str(at), "question": e.text_prompt, **_answer(e)} for at, e in enumerate(text_sums)],
        )
    rng = trio.rng(20)
    traces = [scenes.sum_example(rng) for _ in range(counts["traces"])]
    _write(folder / "traces.jsonl", traces, rng, "train", [{"answer": trace.answer} for trace in traces])
    rng = trio.rng(16)
    texts = {"text-sums": scenes.sum_example, "words": scenes.word_problem}
    for name, draw in texts.items():
        questions = [draw(rng) for _ in range(counts["questions"])]
        if not (folder / f"{name}.jsonl").is_file():
            write_rows(folder / f"{name}.jsonl", [{"question": example.text_prompt} for example in questions])
    return folder


def _write(
    path: Path, examples: list[Example], rng: np.random.Generator, split: world.Split, answers: list[dict[str, str]]
) -> None:
    if path.is_file():
        return
    images = path.parent / "images"
    images.mkdir(parents=True, exist_ok=True)
    rows: list[dict[str, Any]] = []
    for number, example in enumerate(examples):
        file = images / f"{path.stem}-{number:04d}.png"
        if example.scene is not None:
            Image.fromarray(scenes.picture(rng, example.scene, split)).save(file)
        row = {"id": str(number), "question": example.question, "image": f"images/{file.name}"}
        rows.append({**row, **(answers[number] if answers else {})})
    write_rows(path, rows)


def _answer(example: Example) -> dict[str, str]:
    kind = "reasoning" if example.task == "sum" else "perception"
    answer = str(scenes.final_number(example.answer)) if kind == "reasoning" else example.answer
    return {"answer": answer, "task": example.task, "kind": kind}
