"""Core gates (`core_gates.py`) and AdaRank's masks beside gates, at one budget on the embedded trio: what wins?

    python -m experiments.lab.beside_gates --rows benchmarks/results/lab/beside-gates-0.jsonl

Ranks and learning rates are fixed beforehand and all reported; every row meets the budget on validation prompts:
core gates by their training's controller, AdaRank, which knows no budget, by λ.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from experiments.lab.adarank import adarank_gates
from experiments.lab.core_gates import CoreTraining, learn_core
from experiments.lab.experiments import Bench, BenchSizes, Job, Matrices, Row, point_of
from experiments.lab.experiments_jobs import _at
from vlmgraft.analysis.scores import change
from vlmgraft.lab import trio_path
from vlmgraft.storage.jsonl import write_text

BUDGET = 0.003
SIZES = BenchSizes(held_out=384, control=384)
RANKS, RATES = (4, 16), (0.003, 0.01, 0.03)
MASK_RATES = (0.001, 0.01)
CLOSED = -10.0
BESIDE = ("task arithmetic", "FRISM (KL budget)", "FRISM (donor matching)")


def core(bench: Bench, setting: Mapping[str, Any]) -> Row:
    """The row of one training."""
    donor = bench.donor if setting["inject"] == "donor" else None
    training = CoreTraining(
        rank=setting["rank"],
        learning_rate=setting["learning_rate"],
        kl_budget=BUDGET,
        steps=bench.sizes.steps,
    )
    factors, gates = learn_core(bench.distiller(), training, donor)
    matrices: Matrices = bench.matrices(gates, factors)
    return bench.measure(matrices, notes=gates.settings)


def adarank(bench: Bench, setting: Mapping[str, Any]) -> Row:
    """The row of masks that are learned, and then scaled to the budget."""
    gates = adarank_gates(bench.distiller(), steps=bench.sizes.steps, learning_rate=setting["learning_rate"])
    linears = bench.comparison.distiller.linears
    updates = {name: weight - linears[name].weight.data for name, weight in bench.matrices(gates).items()}
    kept = sum(int((logits > CLOSED).sum()) for logits in gates.logits.values())
    matrices, scale = bench.at_budget(updates, BUDGET)
    return bench.measure(matrices, notes={**gates.settings, **scale, "open": kept})


def table(rows: Sequence[Row]) -> str:
    """The rows as Markdown, the best reasoning first, beside FRISM with donor matching: paired by item, for all rows
    together (Bonferroni)."""
    best = next(row for row in rows if row["method"] == BESIDE[-1])
    level = 1 - 0.05 / (len(rows) - 1)
    lines = [
        "| rule | setting | reasoning, % right | from FRISM with donor matching, points | perception, % right "
        "| KL, test prompts | KL, fresh prompts | s |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in sorted(rows, key=lambda row: -point_of(row).marks.reasoning.mean):
        marks = point_of(row).marks
        setting = ", ".join(f"{key} {value}" for key, value in row["setting"].items() if key != "budget")
        apart = "" if row is best else change(best["right"], row["right"], ["sum"], level).signed()
        lines.append(
            f"| {row['method']} | {setting} | {marks.reasoning.percent()} | {apart} | {marks.perception.percent()} "
            f"| {row['kl']:.5f} | {row['fresh_kl']:.5f} | {row['seconds']:.0f} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=Path, required=True)
    bench = Bench(trio_path(), SIZES)
    jobs = [job for job in _at(bench, BUDGET) if job.method in BESIDE]
    for rate in RATES:
        for rank in RANKS:
            for inject in ("distance", "donor"):
                setting = {"budget": BUDGET, "inject": inject, "rank": rank, "learning_rate": rate}
                jobs.append(Job("core gates", setting, lambda setting=setting: core(bench, setting)))
    for rate in MASK_RATES:
        setting = {"budget": BUDGET, "learning_rate": rate}
        jobs.append(Job("AdaRank", setting, lambda setting=setting: adarank(bench, setting)))
    path = parser.parse_args().rows
    write_text(path.with_suffix(".md"), table(bench.run(jobs, path)))


if __name__ == "__main__":
    main()
