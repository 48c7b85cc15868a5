"""Fuzz the targets of tests/fuzz in turn until each has had so much time; a finding ends a round, not the run.

    pip install atheris && nice -n 19 python benchmarks/fuzz.py --minutes 30 --state /tmp/fuzz --out benchmarks/results

`--state` keeps corpora, findings, logs and one row per round, so that runs add up; `--out` gets the sums, fuzz.json.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
TARGETS = ("receipt", "factors", "gates", "config", "pictures", "header", "index", "recipe", "answers")
ROUND = 300


def fuzz_round(target: str, state: Path, seconds: int) -> dict[str, Any]:
    """One process of the fuzzer, until its time is over or it found something; a row with what it did."""
    folder = state / target
    for name in ("corpus", "found", "logs"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    log = folder / "logs" / f"{time.time_ns()}.log"
    command = [sys.executable, str(ROOT / "tests/fuzz/run.py"), target, f"-max_total_time={seconds}"]
    command += [
        "-rss_limit_mb=3000",
        "-timeout=900",
        "-report_slow_units=900",
        "-max_len=2048",
        f"-artifact_prefix={folder / 'found'}/",
    ]
    began = time.monotonic()
    with log.open("w") as file:
        process = subprocess.Popen([*command, str(folder / "corpus")], stdout=file, stderr=file, cwd=ROOT)
        _, status, used = os.wait4(process.pid, 0)
    text = log.read_text(errors="replace")
    last = re.findall(r"^#(\d+)\s", text, re.MULTILINE)
    shown = re.findall(r"cov: (\d+) ft: (\d+) corp: (\d+)", text)
    seed = re.search(r"^INFO: Seed: (\d+)", text, re.MULTILINE)
    found = [name for name in re.findall(r"Test unit written to (\S+)", text) if "slow-unit" not in name]
    if not found:
        log.unlink()
    return {
        "target": target,
        "seed": int(seed[1]) if seed else None,
        "executions": int(last[-1]) if last else 0,
        "wall": round(time.monotonic() - began, 1),
        "cpu": round(used.ru_utime + used.ru_stime, 1),
        "peak_rss": used.ru_maxrss * 1024,
        "coverage": int(shown[-1][0]) if shown else 0,
        "features": int(shown[-1][1]) if shown else 0,
        "corpus": int(shown[-1][2]) if shown else 0,
        "found": [Path(path).name for path in found],
        "status": status,
    }


def rows_of(state: Path, target: str) -> list[dict[str, Any]]:
    """The rounds so far."""
    file = state / target / "rounds.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def seconds_of(state: Path, target: str) -> float:
    """Processor time that a target has had."""
    return float(sum(row["cpu"] for row in rows_of(state, target)))


def fuzz(targets: Sequence[str], state: Path, minutes: float) -> None:
    """Rounds, one process at a time, for the target that has had least, until each has had its processor time."""
    while (least := min((seconds_of(state, target), target) for target in targets))[0] < 60 * minutes:
        done, target = least
        row = fuzz_round(target, state, int(min(ROUND, 60 * minutes - done)) + 1)
        with (state / target / "rounds.jsonl").open("a") as file:
            file.write(json.dumps(row) + "\n")


def summary(state: Path) -> dict[str, Any]:
    """Sums over the rounds of every target."""
    targets = {}
    for target in TARGETS:
        rows = rows_of(state, target)
        if rows:
            sums: dict[str, Any] = {key: round(sum(row[key] for row in rows)) for key in ("executions", "wall", "cpu")}
            most = {key: max(row[key] for row in rows) for key in ("coverage", "features", "corpus", "peak_rss")}
            targets[target] = {
                **sums,
                **most,
                "rounds": len(rows),
                "seeds": [row["seed"] for row in rows if row.get("seed")],
                "stopped_by_findings": sum(any("slow-unit" not in name for name in r["found"]) for r in rows),
            }
    return {"machine": platform.platform(), "python": platform.python_version(), "targets": targets}


def main() -> None:
    """Fuzz, then write the sums."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--minutes", type=float, default=30, help="of processor time for each target, earlier runs counted"
    )
    parser.add_argument("--targets", nargs="+", choices=TARGETS, default=TARGETS)
    parser.add_argument("--state", type=Path, required=True)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    fuzz(options.targets, options.state, options.minutes)
    report = summary(options.state)
    if options.out:
        (options.out / "fuzz.json").write_text(json.dumps(report, indent=2) + "\n")
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
