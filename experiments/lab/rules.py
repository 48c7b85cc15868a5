"""Every rule on one trio at one KL: the rows behind docs/explanation/rules.md.

    python -m experiments.lab.rules --seed 0 --draws 4 --out runs/rules-0 --rows benchmarks/results/lab/rules-0.jsonl

`vlmgraft choose` without dropping, once for each method that learns gates: FRISM with its energy term, with donor
matching, and curvature. Strengths are set on the prompts of the KL, nothing is chosen on the test questions, and all
draws of the calibration questions, the text questions and the prompts of the KL are measured on the same test
questions. What was measured before is found again.
"""

from __future__ import annotations

import argparse
import random
from pathlib import Path
from typing import Any

from transformers.utils.logging import disable_progress_bar

from vlmgraft.analysis import EvalData
from vlmgraft.analysis.choice import choose
from vlmgraft.lab import compare, trio_path, world
from vlmgraft.lab.exam import draw_exam, save_questions
from vlmgraft.storage.jsonl import read_rows, write_rows

SIZES = compare.Sizes()
HELD_OUT, KL_PROMPTS = 256, 192


def recipes(trio: Path, out: Path, seed: int) -> dict[str, dict[str, Any]]:
    """Recipes that learn gates on a trio, whose base is that of the VLM, too, by the name of their rows; question files
    are written below `out`, `out`/divergence.jsonl with the prompts of the KL."""
    images = dict.fromkeys(world.PERCEPTION, (SIZES.calibration + HELD_OUT) // len(world.PERCEPTION))
    calibration = list(draw_exam(seed, "calibration", images).questions)
    random.Random(seed).shuffle(calibration)  # they are drawn task by task; prompts and held-out ones shall have all
    text = draw_exam(seed, "calibration", {"sum": SIZES.donor}, as_image=False).questions
    out.mkdir(parents=True, exist_ok=True)
    save_questions(calibration, out / "calibration.jsonl")
    save_questions(text, out / "questions.jsonl")
    kl_prompts = draw_exam(seed + 1, "test", dict.fromkeys(world.PERCEPTION, KL_PROMPTS // len(world.PERCEPTION)))
    save_questions(kl_prompts.questions, out / "divergence.jsonl")
    models = {"vlm": "vlm", "donor": "donor", "donor_base": "base", "vlm_base": "base"}
    prompts = {
        "samples": SIZES.calibration,
        "held_out": HELD_OUT,
        "max_new_tokens": 28,
        "batch_size": compare.BATCH_SIZE,
    }
    gated = {"rank": "full", "seed": seed, "calibration": {"data": str(out / "calibration.jsonl"), **prompts}}
    frism = {"name": "frism", "steps": SIZES.steps, "learning_rate": compare.LEARNING_RATE, **gated}
    donor = {**frism, "inject": "donor", "questions": str(out / "questions.jsonl")}
    places = {key: str(trio / folder) for key, folder in models.items()} | {"modules": ["attention", "mlp"]}
    methods = {"frism, energy": frism, "frism, donor": donor, "curvature": {"name": "curvature", **gated}}
    return {name: {**places, "method": method} for name, method in methods.items()}


def measure(trio: Path, out: Path, rows: Path, *, seed: int, draws: int, budget: float, samples: int) -> None:
    """Measure all rules below `out`, and write a row per rule and draw to `rows`; rules without gates once a draw."""
    disable_progress_bar()
    measured: list[dict[str, Any]] = []
    for draw in range(draws):
        folder = out / str(draw)
        for number, (name, recipe) in enumerate(recipes(trio, folder, seed + 1000 * draw).items()):
            data = EvalData((f"lab:{seed}",), samples=samples, drift=str(folder / "divergence.jsonl"))
            gated = recipe["method"]["name"]
            choice = choose(
                recipe, folder / name, data, rules=[gated] if number else None, budget=budget, rounds=1, resume=True
            )
            right = {row["rule"]: row["right"] for row in read_rows(folder / name / "test-0.jsonl")}
            for row in choice.rows:
                if row["method"] == gated or not number:
                    own = {"seed": seed, "draw": draw, "budget": budget, "right": right.get(row["method"])}
                    measured.append({**row, "method": name if row["method"] == gated else row["method"], **own})
            write_rows(rows, measured)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trio", type=Path, default=None, help="folder with vlm, donor and base [default: embedded]")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--rows", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0, help="of the test questions and the first draw")
    parser.add_argument("--draws", type=int, default=1, help="of the calibration questions")
    parser.add_argument("--budget", type=float, default=0.003)
    parser.add_argument("--samples", type=int, default=600)
    given = parser.parse_args()
    trio = (given.trio or trio_path()).resolve()
    sizes = {"draws": given.draws, "samples": given.samples}
    measure(trio, given.out, given.rows, seed=given.seed, budget=given.budget, **sizes)


if __name__ == "__main__":
    main()
