"""Merge at the size of Qwen2.5-VL-7B and Qwen2.5-7B on sparse files: does it take the time and memory it should?

    python benchmarks/merge_7b.py --folder /tmp/bench7 --out benchmarks/results/merge_7b      # needs 17 GB of disk

The inputs, 3 × 15 GB with the models' own names and shapes, are holes but for one matrix, so that they fit any disk:
reading a hole costs a page of zeros in the cache, like a warm read. The output is written in full. Each method runs
in a process of its own; `cp` writes the VLM's bytes the same way (`--sparse=never`), without fsync. Seconds of
merges go from headers to the published folder, fsync included; memory as in benchmarks/merge.py, whose functions this
uses.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import merge as small
import torch

from vlmgraft.checkpoint.header import TensorSpec, plan_shards

KEYS = small.KEYS[:3]
METHODS = ("task_arithmetic", "task_arithmetic, torch", "linear")
"""Of benchmarks/merge.py; "torch": not compiled."""


def specs(layers: int, hidden: int, inner: int, kv: int, words: int, *, vlm: bool) -> list[TensorSpec]:
    """Qwen2.5's tensors, and a vision tower of 0.68 billion weights in blocks of its size."""
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (words, hidden)}
    for layer in (f"model.layers.{number}." for number in range(layers)):
        attention = {"q": (hidden, hidden), "k": (kv, hidden), "v": (kv, hidden), "o": (hidden, hidden)}
        shapes |= {f"{layer}self_attn.{letter}_proj.weight": shape for letter, shape in attention.items()}
        shapes |= {f"{layer}self_attn.{letter}_proj.bias": attention[letter][:1] for letter in "qkv"}
        shapes |= {f"{layer}mlp.{kind}_proj.weight": (inner, hidden) for kind in ("gate", "up")}
        shapes[f"{layer}mlp.down_proj.weight"] = (hidden, inner)
        shapes |= {f"{layer}{kind}_layernorm.weight": (hidden,) for kind in ("input", "post_attention")}
    shapes |= {"model.norm.weight": (hidden,), "lm_head.weight": (words, hidden)}
    if vlm:
        shapes |= {f"visual.blocks.{block}.weight": (hidden * 3, hidden * 5 // 9) for block in range(32)}
    return [TensorSpec(name, "BF16", shape) for name, shape in shapes.items()]


def make(folder: Path, size: tuple[int, int, int, int, int]) -> int:
    """The three checkpoints; gives the bytes of the VLM."""
    noise = (1e-3 * torch.randn(1 << 20, generator=torch.Generator().manual_seed(0))).bfloat16()
    total = 0
    for key in KEYS:
        (folder / key).mkdir(parents=True)
        shards = plan_shards(specs(*size, vlm=key == "vlm"), 5 * 10**9)
        for shard in shards:
            with (folder / key / shard.name).open("wb") as file:
                file.write(shard.header)
                begin = len(shard.header)
                for tensor in shard.tensors:
                    if key == "donor" and tensor.name == "model.layers.0.mlp.up_proj.weight":
                        file.seek(begin)
                        file.write(noise[: tensor.nbytes // 2].view(torch.uint8).numpy().tobytes())
                    begin += tensor.nbytes
                file.truncate(shard.size)
            total += shard.size if key == "vlm" else 0
        weight_map = {tensor.name: shard.name for shard in shards for tensor in shard.tensors}
        if len(shards) > 1:
            (folder / key / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
        kind = "qwen2_5_vl" if key == "vlm" else "qwen2"
        (folder / key / "config.json").write_text(json.dumps({"model_type": kind, "tie_word_embeddings": False}))
    return total


def copy(folder: Path, out: Path) -> float:
    """Seconds of cp."""
    os.sync()
    began = time.perf_counter()
    subprocess.run(["cp", "-r", "--sparse=never", str(folder / "vlm"), str(out)], check=True)
    seconds = time.perf_counter() - began
    shutil.rmtree(out)
    return seconds


def main() -> None:
    """Parse the command line, run, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="where checkpoints are made, and removed")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--quick", action="store_true", help="two small layers")
    parser.add_argument("--out", type=Path, help="write OUT.json and OUT.md")
    options = parser.parse_args()
    folder = options.folder / "seven"
    try:
        size = (2, 72, 96, 24, 100) if options.quick else (28, 3584, 18944, 512, 152064)
        nbytes = make(folder, size)
        rows = [{"case": "cp", "seconds": copy(folder, folder / "copy"), "memory": 0.0}]
        for method in METHODS:
            rows.append({"case": method, **small.in_own_process(method, folder, options.threads)})
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    lines = [f"one checkpoint: {nbytes / 1e9:.2f} GB", ""]
    lines += ["| case | seconds | ÷ cp | private memory, MB |", "|---|---|---|---|"]
    for row in rows:
        ratio = row["seconds"] / rows[0]["seconds"]
        lines.append(f"| {row['case']} | {row['seconds']:.1f} | {ratio:.1f} | {row['memory'] / 1e6:.0f} |")
    text = "\n".join(lines) + "\n"
    print(text)
    if options.out:
        about = {"command": " ".join(["python", *sys.argv]), "threads": options.threads, **small.machine()}
        options.out.with_suffix(".json").write_text(json.dumps({"about": about, "rows": rows}, indent=1) + "\n")
        said = "".join(f"- {key}: {value}\n" for key, value in about.items())
        options.out.with_suffix(".md").write_text(f"# benchmarks/merge_7b.py\n\n{text}\n{said}")


if __name__ == "__main__":
    main()
