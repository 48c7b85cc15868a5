"""Print the memory of learning gates per GPU, for models of whom only config.json is read, as docs/gpus.md has it.

python docs/tools/memory_table.py Qwen/Qwen2.5-VL-7B-Instruct --ranks full 256 --tokens 8192 --gpus 8
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace

from vlmgraft.distillation.memory import Rank, Shapes, memory_of
from vlmgraft.hf.models import load_config


def table(name: str, shapes: Shapes, ranks: Sequence[Rank], tokens: int, gpus: int) -> list[str]:
    """Rows of a Markdown table in GiB: by rank, on one GPU and sharded, with and without checkpointed layers."""
    rows = []
    for rank in ranks:
        for ways in dict.fromkeys((1, gpus)):
            plain = memory_of(shapes, rank=rank, tokens=tokens, gpus=ways)
            low = memory_of(shapes, rank=rank, tokens=tokens, gpus=ways, checkpointing=True)
            held = replace(plain, weights=plain.weights + plain.gathered, gathered=0)
            cells = [held.weights, held.factors, held.gates, held.activations, held.logits, held.total]
            figures = " | ".join(f"{cell / 2**30:.1f}" for cell in (*cells, low.activations, low.total))
            rows.append(f"| {name} | {rank} | {ways} | {figures} |")
    return rows


HEADER = (
    "| model | rank | GPUs | weights | factors | gates | activations | logits | total | activations, checkpointed "
    "| total, checkpointed |\n|---|---|---|---|---|---|---|---|---|---|---|"
)


def main() -> None:
    """Print the table for models whose config is at hand."""
    parser = argparse.ArgumentParser(description="Memory of learning gates per GPU, in GiB")
    parser.add_argument("models", nargs="+", help="folders or hub ids; only config.json is read")
    parser.add_argument("--ranks", nargs="+", default=["full", "1024", "256"])
    parser.add_argument("--tokens", type=int, default=8192, help="of a batch, images included")
    parser.add_argument("--gpus", type=int, default=8)
    arguments = parser.parse_args()
    ranks: list[Rank] = ["full" if rank == "full" else int(rank) for rank in arguments.ranks]
    print(HEADER)
    for model in arguments.models:
        shapes = Shapes.of(load_config(model))
        print("\n".join(table(model.rstrip("/").split("/")[-1], shapes, ranks, arguments.tokens, arguments.gpus)))


if __name__ == "__main__":
    main()
