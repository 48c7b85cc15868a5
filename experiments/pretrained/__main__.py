"""One command per stage of the pretrained trio:

    python -m experiments.pretrained base|tower|replay|donor|vlm|data|trio|gates|table|where --root DIR [--seed N]

Every stage makes what it needs, leaves what is finished as it is, and goes on from its last checkpoint. See README.md.
"""

from __future__ import annotations

import argparse
import platform
import time
from pathlib import Path

import torch
import transformers

from experiments.pretrained import models
from experiments.pretrained.donors import KINDS, make_donor
from experiments.pretrained.exams import write_exams
from experiments.pretrained.learned import LEARNED, learned
from experiments.pretrained.results import publish
from experiments.pretrained.stages import Sizes, Trio
from experiments.pretrained.table import METHODS, Table

STAGES = ("base", "tower", "replay", "donor", "vlm", "data", "trio", "gates", "table", "where")
RESULTS = Path(__file__).parent / "results"


def main(arguments: list[str] | None = None) -> int:
    """Run one stage; 3 when the base's package is not installed."""
    parser = argparse.ArgumentParser(prog="python -m experiments.pretrained", description=__doc__)
    parser.add_argument("stage", choices=STAGES)
    parser.add_argument("--root", type=Path, required=True, help="folder for all seeds")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kind", choices=KINDS, default="supervised", help="of the donor")
    parser.add_argument("--replay-sums", action="store_true", help="the VLM that keeps the base's own answers to sums")
    parser.add_argument(
        "--methods", default=",".join((*METHODS, *LEARNED)), help="of the table, with commas between them"
    )
    parser.add_argument("--curve", default="0.2,0.25,0.3,0.4,0.5,0.75,1", help="λ of task arithmetic that are tested")
    parser.add_argument("--scale", type=float, default=0.4, help="λ of where")
    parser.add_argument("--smoke", action="store_true", help="a few steps of everything, to see that it runs")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    given = parser.parse_args(arguments)
    torch.set_num_threads(given.threads)
    if reason := models.missing():
        print(reason)
        return 3
    began = time.monotonic()

    def report(text: str) -> None:
        print(f"[{time.monotonic() - began:5.0f} s] {text}", flush=True)

    trio = Trio(given.root, given.seed, Sizes.smoke() if given.smoke else Sizes(), report)
    trio.folder.mkdir(parents=True, exist_ok=True)
    machine = f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads"
    report(f"torch {torch.__version__}, transformers {transformers.__version__}, {machine}, seed {given.seed}")
    stages = {
        "base": trio.make_base,
        "tower": trio.tower,
        "replay": trio.replay,
        "donor": lambda: make_donor(trio, given.kind),
        "vlm": lambda: trio.vlm(given.replay_sums),
        "data": lambda: write_exams(trio),
        "gates": lambda: measure(trio, given),
        "table": lambda: measure(trio, given),
        "where": lambda: measure(trio, given),
    }
    for stage in ("base", "tower", "replay", "donor", "vlm", "data") if given.stage == "trio" else (given.stage,):
        stages[stage]()
        report(f"{stage}: done")
    return 0


def measure(trio: Trio, given: argparse.Namespace) -> None:
    """The table's rows of the methods that are asked for, or where the effect sits; and the files in results/."""
    vlm = "vlm-replay" if given.replay_sums else "vlm"
    table = Table(trio, vlm, "donor" if given.kind == "supervised" else f"donor-{given.kind}")
    if given.stage == "gates":
        for name in (name for name in given.methods.split(",") if name in LEARNED):
            learned(table, name)
        return
    if given.stage == "where":
        table.where(given.scale)
    else:
        table.run(given.methods.split(","), [float(scale) for scale in given.curve.split(",")])
    publish(table, RESULTS)


if __name__ == "__main__":
    raise SystemExit(main())
