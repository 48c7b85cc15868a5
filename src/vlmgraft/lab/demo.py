"""`vlmgraft demo`: graft reasoning into the lab's VLM and compare the methods, offline and in minutes."""

from __future__ import annotations

import json
import random
import shlex
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import yaml
from PIL import Image
from transformers.utils.logging import disable_progress_bar

from vlmgraft import pipeline
from vlmgraft.errors import CheckpointError
from vlmgraft.evaluation.intervals import Estimate
from vlmgraft.hf.batches import Question
from vlmgraft.hf.models import load_vlm
from vlmgraft.lab import trio_path
from vlmgraft.lab.compare import BATCH_SIZE, LEARNING_RATE, Comparison, Point, Sizes, above_curve
from vlmgraft.lab.exam import save_questions
from vlmgraft.report.charts import save_chart
from vlmgraft.report.parts.tradeoff import tradeoff_chart
from vlmgraft.spectral.threads import threads_for
from vlmgraft.storage.jsonl import write_rows, write_text
from vlmgraft.storage.outputs import refuse_output
from vlmgraft.storage.progress import Progress

ARITHMETIC, ENERGY, DONOR = "task arithmetic", "FRISM, energy term", "FRISM, donor matching"
LINEAR, CONTROL = "linear", "control: shuffled singular vectors"
AXES: dict[str, Callable[[Point], float]] = {
    "kl": lambda point: point.kl,
    "perception": lambda point: point.marks.perception.mean,
}
"""Quantities at whose equal value a point's reasoning is compared with task arithmetic's."""


@dataclass(frozen=True)
class Settings:
    """The settings that are compared: λ of task arithmetic, donor shares, (λ, α) of both FRISM variants; and sizes."""

    scales: Sequence[float]
    shares: Sequence[float]
    energy: Sequence[tuple[float, float]]
    donor: Sequence[tuple[float, float]]
    sizes: Sizes


FULL = Settings(
    scales=(0.25, 0.5, 0.75, 1.0, 1.25),
    shares=(0.1, 0.25, 0.5, 0.75),
    energy=((1.0, 0.1), (1.5, 0.03), (1.5, 0.1), (1.5, 0.3)),
    donor=((1.0, 3.0), (1.5, 3.0), (1.5, 10.0)),
    sizes=Sizes(),
)
QUICK = Settings((0.25, 1.0), (0.25,), ((1.0, 0.1),), ((1.0, 3.0),), Sizes(120, 40, 80, 30, 192, 96, 64, steps=60))


def demo(
    out: Path,
    *,
    seed: int = 0,
    trio: Path | None = None,
    settings: Settings = FULL,
    report: Callable[[str], None] = print,
    progress: Progress | None = None,
) -> list[Point]:
    """Run the comparison into the new folder `out`: table.md, results.jsonl, tradeoff.png, recipe.yaml, merged/.

    Args:
        seed: of exams, calibration questions and training order; the trio stays the same.
        trio: folder with base, vlm and donor; default the embedded one.
        settings: `QUICK` has fewer settings and questions and shorter training, for a first look: wider intervals.
    Raises:
        OutputError: `out` exists. CheckpointError: the trio is not there.
    """
    disable_progress_bar()
    started = time.monotonic()
    trio = trio or trio_path()
    if not (trio / "vlm").is_dir():
        raise CheckpointError(f"{trio}: holds no vlm folder; name a folder with base, vlm and donor, or leave it out")
    refuse_output(out, [trio])
    (out / "work").mkdir(parents=True)

    def say(text: str) -> None:
        report(f"[{time.monotonic() - started:4.0f} s] {text}")

    recipe = _recipe(trio, out, settings.sizes)
    store = pipeline.decompose(pipeline.read_recipe(recipe), out / "work" / "factors")
    alignment = pipeline.pair(pipeline.read_recipe(recipe))
    say(f"decomposed {len(store)} matrices of the donor's task vector")
    factors = {name: store[name] for name in store}
    comparison = Comparison(
        trio, alignment, factors, seed, glyphs=_glyphs(trio), report=say, sizes=settings.sizes, progress=progress
    )
    with threads_for(sum(info.elements for info in alignment.vlm.tensors.values())):
        points, text = _points(comparison, settings, recipe, out, say)
    rows = [_row(point, points) for point in points]
    write_rows(out / "results.jsonl", rows)
    table = _table(points, text, seed)
    write_text(out / "table.md", table)
    save_chart(tradeoff_chart([row for row in rows if row["drawn"]]), out / "tradeoff.png", _finding(points))
    report("\n" + table)
    say(f"wrote {out}/table.md, results.jsonl, tradeoff.png, recipe.yaml, merged/")
    report("ask the merged model:\n" + _ask(comparison, out))
    return points


def _points(
    comparison: Comparison, settings: Settings, recipe: Path, out: Path, say: Callable[[str], None]
) -> tuple[list[Point], Estimate]:
    """All points of the comparison, with the merged folder's at the end, and the donor's score on text."""
    text = comparison.donor_on_text()
    say(f"donor, sums told in text: {text.percent()}")
    points, best = _measure(comparison, settings, out)
    points.append(_merged(comparison, next(point for point in points if point.method == best), recipe, out))
    return points, text


def _measure(comparison: Comparison, settings: Settings, out: Path) -> tuple[list[Point], str]:
    """All points but the reloaded checkpoint's, and the better FRISM variant; every choice is made on validation."""
    vlm_perception = comparison.mark(comparison.validation, None).perception.mean
    points = [comparison.point("VLM", {}, None)]
    for scale in settings.scales:
        points.append(comparison.point(ARITHMETIC, {"scale": scale}, comparison.task_arithmetic(scale)))
    candidates: dict[str, list[tuple[dict[str, float], Callable[[], Any]]]] = {
        ARITHMETIC: [({"scale": scale}, partial(comparison.task_arithmetic, scale)) for scale in settings.scales],
        LINEAR: [({"donor_share": share}, partial(_linear, comparison.trio, out, share)) for share in settings.shares],
    }
    for method, inject, grid in ((ENERGY, "energy", settings.energy), (DONOR, "donor", settings.donor)):
        candidates[method] = [
            ({"scale": scale, "inject_weight": weight}, partial(comparison.gates, inject, scale, weight))
            for scale, weight in grid
        ]
    chosen = {method: comparison.choose(method, tried, vlm_perception) for method, tried in candidates.items()}
    for method, choice in chosen.items():
        label = f"{ARITHMETIC}, chosen" if method == ARITHMETIC else method
        points.append(comparison.point(label, choice.setting, choice.weights))
    points.append(comparison.point(CONTROL, {"scale": 1.0}, comparison.shuffled(1.0)))
    best = max((ENERGY, DONOR), key=lambda method: chosen[method].score)
    return points, best


def _linear(trio: Path, out: Path, share: float) -> Any:
    """The linear merge with a share of the donor, written by `pipeline.merge` and then loaded."""
    folder = out / "work" / f"linear-{share:g}"
    method = {"name": "linear", "vlm_weight": 1 - share}
    recipe = {"vlm": str(trio / "vlm"), "donor": str(trio / "donor"), "method": method}
    pipeline.merge(pipeline.read_recipe(recipe), folder)
    return load_vlm(folder, "float32").eval()


def _merged(comparison: Comparison, best: Point, recipe: Path, out: Path) -> Point:
    """Merge with the recipe of the better FRISM variant, reload the folder and measure it again."""
    save_questions(mixed(comparison.calibration), out / "data" / "calibration.jsonl")
    save_questions(comparison.donor_questions, out / "data" / "questions.jsonl")
    settings = yaml.safe_load(recipe.read_text())
    settings["method"] |= dict(best.setting) | {"seed": comparison.seed}
    if best.method == DONOR:
        settings["method"] |= {"inject": "donor", "questions": str(out / "data" / "questions.jsonl")}
    write_text(recipe, yaml.safe_dump(settings, sort_keys=False, allow_unicode=True))
    pipeline.merge(recipe, out / "merged", workdir=out / "work", progress=comparison.progress)
    return comparison.point("merged folder, reloaded", best.setting, load_vlm(out / "merged", "float32").eval())


def mixed(questions: Sequence[Question]) -> list[Question]:
    """The questions in a fixed random order: an exam is ordered by kind, and `samples` and `held_out` are taken from
    the top of a file."""
    return random.Random(0).sample(questions, len(questions))


def _recipe(trio: Path, out: Path, sizes: Sizes) -> Path:
    """The FRISM recipe of the demo; λ, α and the injection term are filled in once they are chosen."""
    data = str(out / "data" / "calibration.jsonl")
    calibration = {"data": data, "samples": sizes.calibration, "held_out": 0, "max_new_tokens": 28}
    method = {"name": "frism", "steps": sizes.steps, "learning_rate": LEARNING_RATE}
    method["calibration"] = {**calibration, "batch_size": BATCH_SIZE, "packing": "shuffle"}
    places = {"vlm": str(trio / "vlm"), "donor": str(trio / "donor"), "donor_base": str(trio / "base")}
    path = out / "recipe.yaml"
    write_text(path, yaml.safe_dump({**places, "method": method}, sort_keys=False))
    return path


def _glyphs(trio: Path) -> Any:
    """The style of the trio's digits, from its training.json."""
    notes = trio / "training.json"
    return json.loads(notes.read_text()).get("glyphs", "handwriting") if notes.is_file() else "handwriting"


def _curve(points: Sequence[Point]) -> list[Point]:
    return [point for point in points if point.method in ("VLM", ARITHMETIC)]


def _row(point: Point, points: Sequence[Point]) -> dict[str, Any]:
    marks, curve = point.marks, _curve(points)
    equal = {name: above_curve(point, curve, axis) for name, axis in AXES.items()}
    return {
        "method": point.method,
        "setting": point.label,
        "order": next(iter(point.setting.values()), 0),
        "chosen_on": None if point.method in ("VLM", ARITHMETIC, CONTROL) else "validation",
        "drawn": point.method in ("VLM", ARITHMETIC, LINEAR, ENERGY, DONOR, CONTROL),
        "reasoning": asdict(marks.reasoning),
        "perception": asdict(marks.perception),
        "tasks": {task: asdict(marks.of(task)) for task in marks.right},
        "kl": point.kl,
        **{f"above_task_arithmetic_at_equal_{name}": asdict(value) if value else None for name, value in equal.items()},
    }


def _table(points: Sequence[Point], text: Estimate, seed: int) -> str:
    """The comparison as a Markdown table with 95 % bootstrap intervals; marks points no better than task arithmetic."""
    shown = ["method", "setting", "reasoning", "perception", "list colours", "KL"]
    columns = [*shown, *(f"above task arithmetic at equal {name.upper() if name == 'kl' else name}" for name in AXES)]
    lines = [
        f"| {' | '.join(columns)} |",
        "|" + "---|" * len(columns),
        f"| donor, told in text | | {text.percent()} | | | | | |",
    ]
    curve = _curve(points)
    for point in points:
        marks = point.marks
        cells = [point.method, point.label, marks.reasoning.percent(), marks.perception.percent()]
        cells += [
            marks.of("list_colours").percent(),
            f"{point.kl:.4f}",
            *(_verdict(point, curve, axis) for axis in AXES.values()),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    first = points[0].marks.right
    note = (
        f"Test split, {len(first['sum'])} sums and {len(first['read'])} questions per perception task, exam "
        f"seed {seed}; "
        "percent right with 95 % bootstrap intervals; KL in nats per token on held-out image questions. λ, α and the "
        "donor's share were chosen on the validation split: the best reasoning within a point of the VLM's perception. "
        "The last columns are reasoning above the task-arithmetic curve at equal KL and at equal perception, paired by "
        "item."
    )
    return "\n".join(lines) + "\n\n" + note + "\n"


def _verdict(point: Point, curve: Sequence[Point], axis: Callable[[Point], float]) -> str:
    """Reasoning minus task arithmetic's, with a note if it is not better; empty for points of the curve itself."""
    if point.method.startswith((ARITHMETIC, "VLM")):
        return ""
    above = above_curve(point, curve, axis)
    if above is None:
        return "outside its range"
    return above.percent() if above.low > 0 else f"{above.percent()}: does not beat it"


def _finding(points: Sequence[Point]) -> str:
    vlm, merged = (100 * points[index].marks.reasoning.mean for index in (0, -1))
    return f"Sums of handwritten digits in images: VLM {vlm:.0f} %, merged by FRISM {merged:.0f} %"


def _ask(comparison: Comparison, out: Path) -> str:
    """A shell command that asks the merged model about an image, with transformers alone."""
    test = comparison.test
    question = test.questions[next(index for index, item in enumerate(test.items) if item.task == "sum")]
    image = question.images[0]
    if isinstance(image, Image.Image):
        image.save(out / "example.png")
    parts = [{"type": "image", "path": f"{out}/example.png"}, {"type": "text", "text": question.question}]
    code = (
        f'from transformers import pipeline; ask = pipeline("image-text-to-text", "{out}/merged"); '
        f"print(ask(text={json.dumps([{'role': 'user', 'content': parts}])}, return_full_text=False))"
    )
    return f"python -c {shlex.quote(code)}"
