"""Every rule on one trio at one drift: the rows behind docs/explanation/rules.md.

    python -m experiments.lab.rules --out runs/rules-0 --rows benchmarks/results/lab/rules-0.jsonl

`vlmgraft choose` without dropping, twice: with FRISM's energy term among the rules, and with donor matching. Strengths
are set on the prompts of the KL, nothing is chosen on the test questions. What was measured before is found again.
The table beside the rows has differences from task arithmetic, paired by item, at level 1 − 0.05/m for m rules.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers.utils.logging import disable_progress_bar

from vlmgraft.analysis import EvalData
from vlmgraft.analysis.choice import choose
from vlmgraft.analysis.scores import change
from vlmgraft.evaluation.intervals import Estimate
from vlmgraft.lab import compare, trio_path, world
from vlmgraft.lab.exam import draw_exam, save_questions
from vlmgraft.storage.jsonl import read_rows, write_rows, write_text

SIZES = compare.Sizes()
HELD_OUT = 256


def recipes(trio: Path, out: Path, seed: int) -> dict[str, dict[str, Any]]:
    """FRISM's two recipes on a trio, whose base is that of the VLM, too; question files are written below `out`."""
    images = dict.fromkeys(world.PERCEPTION, (SIZES.calibration + HELD_OUT) // len(world.PERCEPTION))
    calibration = list(draw_exam(seed, "calibration", images).questions)
    random.Random(seed).shuffle(calibration)  # they are drawn task by task; prompts and held-out ones shall have all
    text = draw_exam(seed, "calibration", {"sum": SIZES.donor}, as_image=False).questions
    out.mkdir(parents=True, exist_ok=True)
    save_questions(calibration, out / "calibration.jsonl")
    save_questions(text, out / "questions.jsonl")
    models = {"vlm": "vlm", "donor": "donor", "donor_base": "base", "vlm_base": "base"}
    prompts = {
        "samples": SIZES.calibration,
        "held_out": HELD_OUT,
        "max_new_tokens": 28,
        "batch_size": compare.BATCH_SIZE,
    }
    frism = {
        "name": "frism",
        "rank": "full",
        "steps": SIZES.steps,
        "learning_rate": compare.LEARNING_RATE,
        "seed": seed,
        "calibration": {"data": str(out / "calibration.jsonl"), **prompts},
    }
    donor = {"inject": "donor", "questions": str(out / "questions.jsonl")}
    places = {key: str(trio / folder) for key, folder in models.items()} | {"modules": ["attention", "mlp"]}
    return {"energy": {**places, "method": frism}, "donor": {**places, "method": {**frism, **donor}}}


def measure(trio: Path, out: Path, rows: Path, *, seed: int, budget: float, samples: int) -> None:
    """Measure all rules below `out`, write one row per rule to `rows`, and the table beside it."""
    disable_progress_bar()
    measured: list[dict[str, Any]] = []
    for term, recipe in recipes(trio, out, seed).items():
        options: dict[str, Any] = {"budget": budget, "rounds": 1, "resume": True}
        data = EvalData((f"lab:{seed}",), samples=samples)
        choice = choose(recipe, out / term, data, rules=None if term == "energy" else ["frism"], **options)
        right = {row["rule"]: row["right"] for row in read_rows(out / term / "test-0.jsonl")}
        for row in choice.rows:
            if term == "energy" or row["method"] == "frism":
                name = f"frism, {term}" if row["method"] == "frism" else row["method"]
                own = {"method": name, "seed": seed, "budget": budget, "right": right.get(row["method"])}
                measured.append({**row, **own})
    write_rows(rows, measured)
    write_text(rows.with_suffix(".md"), table(measured))


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """The rows as Markdown, the best reasoning first; rules that cannot meet the budget last."""
    compared = [row for row in rows if "reasoning" in row]
    reference = next(row for row in compared if row["method"] == "task_arithmetic")
    tasks = [task for task in reference["right"] if task.startswith("reasoning:")]
    level = 1 - 0.05 / (len(compared) - 2)
    lines = [
        "| rule | strength | KL | reasoning, % right | from task arithmetic, points | perception, % right | s |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in sorted(compared, key=lambda row: -row["reasoning"]["mean"]):
        reasoning, perception = (Estimate(**row[kind]).percent() for kind in ("reasoning", "perception"))
        behind = "" if row is reference else change(reference["right"], row["right"], tasks, level).signed()
        facts = ["" if row["strength"] is None else f"{row[key]:.3g}" for key in ("strength", "kl", "seconds")]
        lines.append(
            f"| {row['method']} | {facts[0]} | {facts[1]} | {reasoning} | {behind} | {perception} | {facts[2]} |"
        )
    out = [f"| {row['method']} | none | {row['kl']:.2g} | | | | |" for row in rows if row not in compared]
    return "\n".join([*lines, *out]) + "\n"


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trio", type=Path, default=None, help="folder with vlm, donor and base [default: embedded]")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--rows", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--budget", type=float, default=0.003)
    parser.add_argument("--samples", type=int, default=800)
    given = parser.parse_args()
    trio = (given.trio or trio_path()).resolve()
    measure(trio, given.out, given.rows, seed=given.seed, budget=given.budget, samples=given.samples)


if __name__ == "__main__":
    main()
