"""A command on a machine with one busy core, as a ratio to the same command on an idle one.

python benchmarks/busy.py --out benchmarks/results/busy.json    # the quick demo, three minutes on an idle machine
python benchmarks/busy.py --quick                                # a command of seconds: does it run?
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path


def spin() -> None:
    """Keep one core busy."""
    while True:
        pass


def seconds(words: list[str], busy: bool) -> float:
    """Wall time of one `vlmgraft` command with threads as by default; `busy`: beside a process that spins."""
    environment = {key: value for key, value in os.environ.items() if key not in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")}
    spinning = multiprocessing.Process(target=spin, daemon=True)
    if busy:
        spinning.start()
    try:
        began = time.perf_counter()
        command = [sys.executable, "-m", "vlmgraft", *words]
        subprocess.run(command, check=True, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        return time.perf_counter() - began
    finally:
        if busy:
            spinning.kill()
            spinning.join()


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a command of seconds")
    parser.add_argument("--out", type=Path, help="JSON file for the times")
    given = parser.parse_args()
    words, load, times = ["costs", "--size", "7b"] if given.quick else ["demo", "--quick"], os.getloadavg(), {}
    for name in ("idle", "busy"):
        with tempfile.TemporaryDirectory() as folder:
            place = [] if given.quick else ["--out", f"{folder}/demo"]
            times[name] = seconds([*words, *place], busy=name == "busy")
    times["ratio"] = times["busy"] / times["idle"]
    print(f"vlmgraft {' '.join(words)}: " + ", ".join(f"{name} {value:.2f}" for name, value in times.items()))
    if given.out:
        facts = {"command": words, "cores": os.cpu_count(), "load before": load, **times}
        given.out.write_text(json.dumps(facts, indent=1) + "\n")


if __name__ == "__main__":
    main()
