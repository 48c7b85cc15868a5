"""Time planning a merge of mixture-of-experts checkpoints from their headers alone.

    python benchmarks/plan.py --out benchmarks/results/plan          # 3 × 50,000 tensors
    python benchmarks/plan.py --quick                                # 3 × 1,300

Three folders of sparse files (headers with the names of Qwen3-VL-MoE and Qwen3-MoE, per-expert tensors, no data) are
opened, aligned and planned `--repeats` times in one process; the table gives medians. The floor is reading the same
headers with `json.loads` and nothing else.
"""

from __future__ import annotations

import argparse
import gc
import json
import platform
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from vlmgraft.alignment import align
from vlmgraft.checkpoint.header import TensorSpec, plan_shards
from vlmgraft.checkpoint.index import open_checkpoint
from vlmgraft.merging import plan_merge
from vlmgraft.methods import METHODS

KEYS = ("vlm", "donor", "donor_base")


def make(folder: Path, layers: int, experts: int, *, vlm: bool) -> int:
    """A checkpoint of headers over sparse files; gives its number of tensors."""
    folder.mkdir(parents=True)
    body = "model.language_model." if vlm else "model."
    shapes: dict[str, tuple[int, ...]] = {f"{body}embed_tokens.weight": (100, 64), f"{body}norm.weight": (64,)}
    for layer in (f"{body}layers.{number}." for number in range(layers)):
        shapes |= {f"{layer}self_attn.{letter}_proj.weight": (64, 64) for letter in "qkvo"}
        shapes |= {f"{layer}{kind}_layernorm.weight": (64,) for kind in ("input", "post_attention")}
        shapes[f"{layer}mlp.gate.weight"] = (experts, 64)
        for expert in range(experts):
            wide = {"gate": (32, 64), "up": (32, 64), "down": (64, 32)}
            shapes |= {f"{layer}mlp.experts.{expert}.{kind}_proj.weight": shape for kind, shape in wide.items()}
    shapes |= {"lm_head.weight": (100, 64)} | ({"visual.blocks.0.attn.qkv.weight": (96, 32)} if vlm else {})
    shards = plan_shards([TensorSpec(name, "BF16", shape) for name, shape in shapes.items()], 20 * 10**6)
    for shard in shards:
        with (folder / shard.name).open("wb") as file:
            file.write(shard.header)
            file.truncate(shard.size)
    weight_map = {tensor.name: shard.name for shard in shards for tensor in shard.tensors}
    if len(shards) > 1:
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    kind = "qwen3_vl_moe" if vlm else "qwen3_moe"
    (folder / "config.json").write_text(json.dumps({"model_type": kind, "tie_word_embeddings": False}))
    return len(shapes)


def floor(folder: Path) -> None:
    """Parse every header and nothing else."""
    for file in sorted(folder.glob("*/*.safetensors")):
        with file.open("rb") as handle:
            json.loads(handle.read(int.from_bytes(handle.read(8), "little")))


def measure(folder: Path, repeats: int) -> dict[str, float]:
    """Median seconds by phase."""
    runs: dict[str, list[float]] = {}
    for _ in range(repeats):
        gc.collect()  # what the turn before left
        times = [time.perf_counter()]
        floor(folder)
        times.append(time.perf_counter())
        opened = [open_checkpoint(folder / key) for key in KEYS]
        times.append(time.perf_counter())
        alignment = align(*opened)
        times.append(time.perf_counter())
        plan_merge(alignment, METHODS["task_arithmetic"]())
        times.append(time.perf_counter())
        phases = ("json.loads of the headers", "open", "align", "plan")
        for phase, begin, end in zip(phases, times, times[1:], strict=False):
            runs.setdefault(phase, []).append(end - begin)
        runs.setdefault("open + align + plan", []).append(times[-1] - times[1])
        del opened, alignment
    return {phase: statistics.median(seconds) for phase, seconds in runs.items()}


def main() -> None:
    """Parse the command line, run, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="one repeat, small")
    parser.add_argument("--out", type=Path, help="write OUT.json and OUT.md")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        size = (4, 100) if options.quick else (48, 345)
        counts = [make(Path(temporary) / key, *size, vlm=key == "vlm") for key in KEYS]
        seconds = measure(Path(temporary), 1 if options.quick else options.repeats)
    about: dict[str, Any] = {"command": " ".join(["python", *sys.argv]), "tensors": counts}
    about |= {"python": platform.python_version(), "machine": platform.machine()}
    lines = [f"three checkpoints of {counts[0]:,}, {counts[1]:,} and {counts[2]:,} tensors", ""]
    lines += [
        "| phase | seconds, median |",
        "|---|---|",
        *(f"| {name} | {took:.2f} |" for name, took in seconds.items()),
    ]
    text = "\n".join(lines) + "\n"
    print(text)
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.with_suffix(".json").write_text(json.dumps({"about": about, "seconds": seconds}, indent=1) + "\n")
        said = "".join(f"- {key}: {value}\n" for key, value in about.items())
        options.out.with_suffix(".md").write_text(f"# benchmarks/plan.py\n\n{text}\n{said}")


if __name__ == "__main__":
    main()
