"""Throughput of `vlmgraft evaluate`: batches against one question at a time, on the embedded VLM.

    python benchmarks/evaluate.py [--quick] [--out benchmarks/results]

The same items are asked both ways, in turns, and must get the same answers; times are of `ask` alone, records on disk
included, after one warm-up. Writes OUT/evaluate.json and prints a table.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import tempfile
import time
from pathlib import Path

import torch

from vlmgraft.evaluation.ask import ask
from vlmgraft.evaluation.engine import Sampling, TransformersEngine
from vlmgraft.hf.models import load_processor, load_vlm
from vlmgraft.lab import trio_path, world
from vlmgraft.lab.exam import MAX_NEW_TOKENS, draw_exam


def seconds(engine: TransformersEngine, suite, batch_size: int, folder: Path) -> tuple[float, list]:
    """One run, records logged; its time and its records."""
    log = folder / f"{time.monotonic_ns()}.jsonl"
    started = time.perf_counter()
    records = ask(engine, suite, batch_size=batch_size, log=log)
    return time.perf_counter() - started, records


def measure(items: int, batch_sizes: list[int], repeats: int) -> dict:
    """Median seconds by batch size, and whether all runs said the same."""
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "2")))
    trio = trio_path()
    engine = TransformersEngine(
        load_vlm(trio / "vlm", torch.float32), load_processor(trio / "vlm"), Sampling(MAX_NEW_TOKENS)
    )
    suite = draw_exam(0, "test", {"sum": items // 2, **dict.fromkeys(world.PERCEPTION, items // 8)}).suite
    times: dict[int, list[float]] = {size: [] for size in batch_sizes}
    said = {}
    with tempfile.TemporaryDirectory() as folder:
        for size in batch_sizes:
            seconds(engine, draw_exam(1, "test", {"sum": 4}).suite, size, Path(folder))
        for _ in range(repeats):
            for size in batch_sizes:
                took, records = seconds(engine, suite, size, Path(folder))
                times[size].append(took)
                said[size] = [record.output for record in records]
    medians = {size: statistics.median(each) for size, each in times.items()}
    return {
        "items": len(suite.items),
        "repeats": repeats,
        "seconds": {str(size): each for size, each in times.items()},
        "items_per_second": {str(size): len(suite.items) / median for size, median in medians.items()},
        "times_one_by_one": {str(size): medians[1] / median for size, median in medians.items()},
        "differing_answers": {
            str(size): sum(a != b for a, b in zip(said[1], said[size], strict=True)) for size in batch_sizes
        },
        "machine": {"threads": torch.get_num_threads(), "torch": torch.__version__, "processor": platform.machine()},
    }


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a few seconds: 32 items, once")
    parser.add_argument("--items", type=int, default=240)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path, help="folder for evaluate.json")
    arguments = parser.parse_args()
    items, repeats, sizes = (
        (32, 1, [1, 16]) if arguments.quick else (arguments.items, arguments.repeats, [1, 8, 32, 128])
    )
    found = measure(items, sizes, repeats)
    print("| batch size | items per second | times one by one | answers that differ |\n|---|---|---|---|")
    for size in map(str, sizes):
        row = (found["items_per_second"][size], found["times_one_by_one"][size], found["differing_answers"][size])
        print(f"| {size} | {row[0]:.1f} | {row[1]:.1f} | {row[2]} |")
    if arguments.out:
        arguments.out.mkdir(parents=True, exist_ok=True)
        (arguments.out / "evaluate.json").write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
