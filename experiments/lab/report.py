"""A report with every section, made on the lab: merge, distances, sweep, knock-outs, bands."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image
from transformers.utils.logging import disable_progress_bar

from vlmgraft import pipeline
from vlmgraft.analysis import EvalData, inspect_weights, knockout, ranks, sweep
from vlmgraft.errors import CheckpointError
from vlmgraft.evaluation.answers import final_answer, judge
from vlmgraft.hf.models import load_processor, load_vlm
from vlmgraft.lab import trio_path, world
from vlmgraft.lab.compare import BATCH_SIZE, LEARNING_RATE, Sizes
from vlmgraft.lab.exam import draw_exam, save_questions
from vlmgraft.report import page
from vlmgraft.storage.jsonl import write_rows
from vlmgraft.storage.outputs import refuse_output

SHOWN: Mapping[str, int] = {"sum": 8, "read": 2, "list_colours": 4}
SIZES = Sizes()
GRIDS = (
    "task arithmetic:method.scale=0.25:1.25:0.25",
    "TIES:method.scale=0.5:2:0.5",
    "STAR:method.scale=0.25:1:0.25",
    "FRISM, energy term:method.inject_weight=0.03,0.1,0.3",
    "FRISM, donor matching:method.inject_weight=1,3,10",
)


def write_lab_report(
    out: Path,
    *,
    seed: int = 0,
    trio: Path | None = None,
    samples: int = 200,
    sizes: Sizes = SIZES,
    grids: Sequence[str] = GRIDS,
    resume: bool = False,
    report: Callable[[str], None] = print,
) -> Path:
    """Merge with FRISM on the lab, analyse the result, and write `out`/report.html beside the rows it is made of.

    Args:
        samples: sums per exam; a quarter of it per kind of perception. sizes: of what FRISM learns on. grids: of the
            sweep. resume: go on with what is in `out`.
    Raises:
        OutputError: `out` exists. CheckpointError: the trio is not there.
    """
    disable_progress_bar()
    began = time.monotonic()
    trio = (trio or trio_path()).resolve()
    if not (trio / "vlm").is_dir():
        raise CheckpointError(
            f"{trio}: holds no vlm folder; make a trio with `python -m experiments.lab train --out DIR`"
        )
    if not resume:
        refuse_output(out, [trio])
    out.mkdir(parents=True, exist_ok=True)

    def say(text: str) -> None:
        report(f"[{time.monotonic() - began:4.0f} s] {text}")

    recipes = _recipes(trio, out, seed, sizes)
    chosen = {**recipes["FRISM, donor matching"]}
    if not (out / "merged").is_dir():
        pipeline.merge(chosen, out / "merged", workdir=out / "work")
        say("merged by FRISM with donor matching")
    inspection = inspect_weights(chosen, spectra=True, out=out / "inspect")
    say(f"distances: {inspection.extent}")
    data = EvalData((f"lab:{seed}",), samples=2 * samples)
    rows = sweep(recipes, grids, out / "sweep", data, resume=resume)
    say(f"swept {len(rows)} points of {len(recipes)} methods")
    cells = knockout(out / "merged", out / "knockout", data, vlm=str(trio / "vlm"), resume=resume)
    say(f"knocked out {len(cells)} cells")
    ranks(chosen, out / "ranks", data, by="energy", resume=resume)
    say("injected the directions band by band")
    _answers(out, trio, seed)
    path = page.write_report([out], out / "report.html")
    say(f"wrote {path}")
    return path


def _recipes(trio: Path, out: Path, seed: int, sizes: Sizes) -> dict[str, dict[str, Any]]:
    """One recipe per method; the question files of FRISM are written."""
    calibration = draw_exam(seed, "calibration", dict.fromkeys(world.PERCEPTION, sizes.calibration // 4)).questions
    text = draw_exam(seed, "calibration", {"sum": sizes.donor}, as_image=False).questions
    save_questions(calibration, out / "data" / "calibration.jsonl")
    save_questions(text, out / "data" / "questions.jsonl")
    places = {"vlm": str(trio / "vlm"), "donor": str(trio / "donor"), "donor_base": str(trio / "base")}
    learned = {"steps": sizes.steps, "learning_rate": LEARNING_RATE, "seed": seed}
    prompts: dict[str, Any] = {"data": str(out / "data" / "calibration.jsonl"), "samples": sizes.calibration}
    prompts |= {"held_out": 0, "max_new_tokens": 28, "batch_size": BATCH_SIZE}
    frism = {"name": "frism", **learned, "calibration": prompts}
    donor = {"inject": "donor", "questions": str(out / "data" / "questions.jsonl"), "inject_weight": 3.0}
    return {
        "task arithmetic": {**places, "method": {"name": "task_arithmetic"}},
        "TIES": {**places, "vlm_base": str(trio / "base"), "method": {"name": "ties", "density": 0.5}},
        "STAR": {**places, "method": {"name": "spectral", "rule": "star", "eta": 0.9}},
        "FRISM, energy term": {**places, "method": {**frism, "inject_weight": 0.1}},
        "FRISM, donor matching": {**places, "method": {**frism, **donor}},
    }


def _answers(out: Path, trio: Path, seed: int) -> None:
    """The same test questions to the VLM and to the merged model, with images, into answers/answers.jsonl."""
    folder = out / "answers"
    folder.mkdir(exist_ok=True)
    processor = load_processor(trio / "vlm")
    exam = draw_exam(seed, "test", SHOWN)
    models = {"VLM": trio / "vlm", "merged": out / "merged"}
    outputs = {name: exam.mark(load_vlm(path, "float32"), processor).outputs for name, path in models.items()}
    rows = []
    for number, (item, question) in enumerate(zip(exam.items, exam.questions, strict=True)):
        name = f"{number:02d}.png"
        if question.images and isinstance(question.images[0], Image.Image):
            question.images[0].save(folder / name)
        answers = [
            {"model": model, "said": texts[number], "right": _right(texts[number], item.answer)}
            for model, texts in outputs.items()
        ]
        kind = "reasoning" if item.task == "sum" else "perception"
        facts = {"task": item.task, "kind": kind, "question": item.question, "expected": final_answer(item.answer)}
        rows.append({**facts, "image": name, "answers": answers})
    write_rows(folder / "answers.jsonl", rows)


def _right(output: str, expected: str) -> bool:
    return judge(output, final_answer(expected)).score == 1
