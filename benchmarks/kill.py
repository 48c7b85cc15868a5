"""kill -9 at seeded moments of every command that writes, at least as often as is asked for in all.

    python benchmarks/kill.py --kills 200 --out benchmarks/results

Runs on the embedded trio with the harness of the tests (`tests/faults/kills.py`, which says what is checked after each
kill and after each run to the end) and writes `kill.json`: per command the kills, what was under the final name after
them, the runs to the end, and the moments. The first thing that is not as promised ends it with an error.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path

import numpy

import vlmgraft as vg
from vlmgraft.lab import trio_path, world
from vlmgraft.storage.jsonl import write_json, write_rows

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "faults"))
from jobs import make_jobs
from kills import Victim, Warm

COMMANDS = ("merge", "ties", "frism", "decompose", "gates", "tune", "evaluate")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=210, help="in all, at least")
    parser.add_argument("--seed", type=int, default=0, help="of the first chain")
    parser.add_argument("--commands", nargs="*", default=COMMANDS)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    began, trio, seed = time.monotonic(), trio_path(), options.seed
    with tempfile.TemporaryDirectory() as scratch, Warm("tune") as warm:
        inputs = Path(scratch) / "inputs"
        jobs = make_jobs(trio, _calibration(inputs), inputs)
        vg.decompose(inputs / "frism.yaml", inputs / "factors")
        vg.gates(inputs / "frism.yaml", inputs / "factors", inputs / "gates")
        read = (trio, *(path for path in (inputs / "factors", inputs / "gates", inputs / "images")))
        victims = [Victim(name, jobs[name], read, Path(scratch) / name, warm) for name in options.commands]
        while (done := sum(victim.kills for victim in victims)) < options.kills:
            for victim in victims:
                victim.chain(seed, 5, resume=seed % 2 == 0)
            seed += 1
            print(f"{done} kills, {time.monotonic() - began:.0f} s", flush=True)
        found = {victim.name: asdict(victim.tally) for victim in victims}
    for name, tally in found.items():
        print(name, {key: value for key, value in tally.items() if key != "moments"})
    facts = {"kills": done, "seeds": [options.seed, seed - 1], "seconds": round(time.monotonic() - began)}
    if options.out is not None:
        versions = {"python": platform.python_version(), "vlmgraft": vg.__version__}
        write_json(options.out / "kill.json", {**facts, "versions": versions, "commands": found})
    print(json.dumps(facts))


def _calibration(inputs: Path) -> Path:
    """24 image questions of the lab's world."""
    (inputs / "images").mkdir(parents=True)
    rng, rows = numpy.random.default_rng(0), []
    for number in range(24):
        item = world.draw_item(rng, world.PERCEPTION[number % 4])
        assert item.scene is not None
        world.render(rng, item.scene, "calibration").save(inputs / "images" / f"{number}.png")
        rows.append({"question": item.question, "image": f"{number}.png"})
    write_rows(inputs / "images" / "calibration.jsonl", rows)
    return inputs / "images" / "calibration.jsonl"


if __name__ == "__main__":
    main()
