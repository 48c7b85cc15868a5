"""Fine-tuning with and without DRIFT's prior on the lab, over base seeds that were named beforehand: 0, 1 and 2.

    python benchmarks/lab_drift.py --trios embedded TRIO1 TRIO2 --out benchmarks/results/lab
    python benchmarks/lab_drift.py --summarise benchmarks/results/lab/drift-*.jsonl

TRIO1 and TRIO2 are folders of `python -m experiments.lab train --seed N`. Strengths are chosen on the validation split
of the first trio and carried over to the others; the learning rate of plain fine-tuning, which every arm uses, on each
trio's own.
Rows go to OUT/drift-N.jsonl; what a file holds is not made again: about seven minutes of one core for the first trio,
three for each other. `--summarise` prints the marks per trio, and what each arm is above plain fine-tuning, paired by
item over all trios, with 95 % bootstrap intervals over items.
"""

from __future__ import annotations

import argparse
import platform
from pathlib import Path

import numpy as np

from vlmgraft.evaluation.intervals import bootstrap
from vlmgraft.lab.world import PERCEPTION
from vlmgraft.storage.jsonl import read_rows

BASELINE = "SFT"


def run(trio: Path, out: Path, seed: int, carried: Path | None) -> None:
    """Make the rows of one trio, with the settings of `carried` if that is given."""
    import torch
    from transformers.utils.logging import disable_progress_bar

    from experiments.lab.tuning import Study

    disable_progress_bar()
    torch.set_num_threads(1)
    Study(trio, out, carried=carried, report=lambda text: print(f"trio {seed}: {text}", flush=True)).run()


def tests(files: list[Path]) -> list[dict[str, dict]]:
    """Per file: method → test row."""
    return [{row["method"]: row for row in read_rows(file) if row["split"] == "test"} for file in files]


def difference(rows: dict[str, dict], method: str, kind: str) -> np.ndarray:
    """Right minus right of plain fine-tuning, item by item; of perception the mean of its tasks' differences."""
    names = ("sum",) if kind == "reasoning" else PERCEPTION
    one, other = rows[method]["right"], rows[BASELINE]["right"]
    return np.concatenate([np.subtract(one[name], other[name]) for name in names]).astype(float)


def summary(files: list[Path]) -> str:
    """Two tables in Markdown: every trio's marks, and the differences from plain fine-tuning over all trios."""
    tables = tests(files)
    names = [file.stem.replace("drift-", "seed ") for file in files]
    lines = [f"| reasoning / perception / KL | {' | '.join(names)} | setting |", "|" + "---|" * (len(files) + 2)]
    for method in tables[0]:
        rows = [table.get(method) for table in tables]
        lines.append(f"| {method} | {' | '.join(map(_cell, rows))} | {'; '.join(filter(None, map(_setting, rows)))} |")
    lines += ["", "| points above SFT, all trios, paired by item | reasoning | perception |", "|---|---|---|"]
    for method in tables[0]:
        complete = [table for table in tables if method in table and BASELINE in table]
        if method == BASELINE or not complete:
            continue
        cells = [
            bootstrap([np.concatenate([difference(table, method, kind) for table in complete])])
            for kind in ("reasoning", "perception")
        ]
        shown = (f"{100 * e.mean:+.1f} [{100 * e.low:+.1f}, {100 * e.high:+.1f}]" for e in cells)
        lines.append(f"| {method} | {' | '.join(shown)} |")
    return "\n".join(lines) + "\n"


def _cell(row: dict | None) -> str:
    if row is None:
        return ""
    return f"{100 * row['reasoning']['mean']:.1f} / {100 * row['perception']['mean']:.1f} / {row['kl']:.4f}"


def _setting(row: dict | None) -> str:
    if row is None or not row["setting"]:
        return ""
    strength = row["setting"]["strength"]
    return f"{row['setting']['learning_rate']:g}" + (f", a {strength:g}" if strength else "")


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trios", nargs="+", default=["embedded"])
    parser.add_argument("--numbers", type=int, nargs="+", help="base seeds of the trios, for the files' names")
    parser.add_argument("--out", type=Path, default=Path("runs"))
    parser.add_argument("--summarise", type=Path, nargs="+", help="only make the tables of these files")
    arguments = parser.parse_args()
    files = arguments.summarise
    if not files:
        from vlmgraft.lab import trio_path

        files = []
        numbers = arguments.numbers or range(len(arguments.trios))
        for number, trio in zip(numbers, arguments.trios, strict=True):
            files.append(arguments.out / f"drift-{number}.jsonl")
            carried = files[0] if len(files) > 1 else None
            run(trio_path() if trio == "embedded" else Path(trio), files[-1], number, carried)
    print(summary(files))
    print(f"Python {platform.python_version()}, {platform.processor() or platform.machine()}")


if __name__ == "__main__":
    main()
