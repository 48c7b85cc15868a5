"""The lab's experiments: every method at equal KL, other questions and tasks, rank, α, other spectra, budgets.

    python benchmarks/lab_variants.py table rank --trio T --out benchmarks/results/lab/variants-0.jsonl
    python benchmarks/lab_variants.py all --quick --out /tmp/quick.jsonl      a smoke test, minutes
    python benchmarks/lab_variants.py report --out benchmarks/results/lab     variants.md from variants-*.jsonl there

T is a folder with a trio (default: the embedded one, base seed 0). Rows are appended as they are finished; the same
command goes on where it was interrupted. About 25 seconds a row on one core.
"""

from __future__ import annotations

import argparse
from pathlib import Path

EXPERIMENTS = ("table", "questions", "rank", "weight", "spectra", "front", "scatter", "landing")
BUDGETS = (0.003,)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("experiments", nargs="+", choices=(*EXPERIMENTS, "all", "report"))
    parser.add_argument("--trio", type=Path, help="folder with base, vlm, donor and training.json")
    parser.add_argument("--out", type=Path, required=True, help="file of rows; of report: the folder of these files")
    parser.add_argument("--budgets", type=float, nargs="+", default=BUDGETS, help="KL in nats per token")
    parser.add_argument("--quick", action="store_true", help="few questions and steps: shows that it runs, no more")
    arguments = parser.parse_args()
    if arguments.experiments == ["report"]:
        from lab_report import write_report

        write_report(arguments.out)
        return
    from experiments.lab.experiments import FULL, QUICK, Bench
    from experiments.lab.experiments_jobs import EXPERIMENTS as JOBS
    from vlmgraft.lab import trio_path

    names = EXPERIMENTS if "all" in arguments.experiments else arguments.experiments
    bench = Bench(arguments.trio or trio_path(), QUICK if arguments.quick else FULL)
    for name in names:
        bench.run(JOBS[name](bench, arguments.budgets), arguments.out)


if __name__ == "__main__":
    main()
