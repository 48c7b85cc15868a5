"""The lab's trio from scratch, and a report on it with every section:

python -m experiments.lab train --out TRIO [--seed N] [--printed]     about 15 minutes on two cores
python -m experiments.lab report --out DIR [--trio TRIO] [--resume]   about five minutes; DIR/report.html
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from vlmgraft.errors import VlmgraftError


def main(arguments: list[str] | None = None) -> int:
    """Run one of the two; 2 when an input or the output is refused."""
    parser = argparse.ArgumentParser(
        prog="python -m experiments.lab", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=("train", "report"))
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    parser.add_argument("--seed", type=int, default=0, help="of data, weights and order; of the report's exams")
    parser.add_argument("--printed", action="store_true", help="train on printed digits, a control")
    parser.add_argument("--trio", type=Path, help="report: another trio than the embedded one")
    parser.add_argument("--samples", type=int, default=200, help="report: sums per exam; a quarter per perception task")
    parser.add_argument("--resume", action="store_true", help="report: go on with what is in the folder")
    options = parser.parse_args(arguments)
    try:
        if options.what == "train":
            from experiments.lab.train import train_trio

            train_trio(options.seed, options.out, glyphs="printed" if options.printed else "handwriting")
        else:
            from experiments.lab.report import write_lab_report

            write_lab_report(
                options.out, seed=options.seed, trio=options.trio, samples=options.samples, resume=options.resume
            )
    except VlmgraftError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
