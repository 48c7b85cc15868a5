"""The lab's comparison over base seeds that were named beforehand: 0, 1 and 2.

    python benchmarks/lab.py --seeds 0 1 2 --out runs        trains each trio (15 minutes), runs the demo
    python benchmarks/lab.py --summarise benchmarks/results/lab/seed-*.jsonl

Each seed's rows are written to OUT/seed-N.jsonl; the summary is a table with one column per seed.
"""

from __future__ import annotations

import argparse
import platform
import shutil
from pathlib import Path

from vlmgraft.storage.jsonl import read_rows

SHOWN = (
    "VLM",
    "task arithmetic, chosen",
    "linear",
    "FRISM, energy term",
    "FRISM, donor matching",
    "control: shuffled singular vectors",
)


def run(seed: int, out: Path) -> Path:
    """Train the trio of one seed (unless it is there) and run the demo on it; gives the file of rows."""
    from experiments.lab.train import train_trio
    from vlmgraft.lab.demo import demo

    trio = out / f"trio-{seed}"
    if not trio.exists():
        train_trio(seed, trio)
    demo(out / f"demo-{seed}", trio=trio)
    rows = out / f"seed-{seed}.jsonl"
    shutil.copyfile(out / f"demo-{seed}" / "results.jsonl", rows)
    return rows


def summary(files: list[Path]) -> str:
    """Markdown: per seed reasoning / perception / KL, and reasoning above task arithmetic at equal KL in brackets."""
    names = [file.stem.replace("-", " ") for file in files]
    lines = [f"| reasoning / perception / KL (above task arithmetic at equal KL) | {' | '.join(names)} |"]
    lines.append("|" + "---|" * (len(files) + 1))
    tables = [{row["method"]: row for row in read_rows(file)} for file in files]
    for method in SHOWN:
        lines.append(f"| {method} | {' | '.join(_cell(table[method]) for table in tables)} |")
    return "\n".join(lines) + "\n"


def _cell(row: dict) -> str:
    figures = f"{100 * row['reasoning']['mean']:.1f} / {100 * row['perception']['mean']:.1f} / {row['kl']:.4f}"
    above = row["above_task_arithmetic_at_equal_kl"]
    if above is None or row["method"] in ("VLM", "task arithmetic, chosen"):
        return figures
    return f"{figures} ({100 * above['mean']:+.1f} [{100 * above['low']:+.1f}, {100 * above['high']:+.1f}])"


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--out", type=Path, default=Path("runs"))
    parser.add_argument("--summarise", type=Path, nargs="+", help="only make the table of these files")
    arguments = parser.parse_args()
    files = arguments.summarise or [run(seed, arguments.out) for seed in arguments.seeds]
    print(summary(files))
    print(f"Python {platform.python_version()}, {platform.processor() or platform.machine()}")


if __name__ == "__main__":
    main()
