"""Core gates (`distillation/core.py`) beside gates, at one budget on the embedded trio: do they win at equal drift?

    python -m experiments.lab.cores --rows benchmarks/results/lab/cores-0.jsonl

Ranks and learning rates are fixed beforehand and all reported; every row meets the budget on validation prompts.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from experiments.lab.experiments import Bench, BenchSizes, Job, Matrices, Row
from experiments.lab.experiments_jobs import _at
from vlmgraft.distillation.core import CoreTraining, learn_core
from vlmgraft.lab import trio_path

BUDGET = 0.003
SIZES = BenchSizes(held_out=384, control=384)
RANKS, RATES = (4, 16), (0.003, 0.01, 0.03)
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
    bench.run(jobs, parser.parse_args().rows)


if __name__ == "__main__":
    main()
