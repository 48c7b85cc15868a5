"""The stages of a FRISM merge for a model at hand: `python -m vlmgraft.scale MODEL --rank 256 --gpus 8`."""

from __future__ import annotations

import argparse

from vlmgraft.hf.models import load_config
from vlmgraft.scale.cost import A100, H100, Work, stages
from vlmgraft.scale.models import Model
from vlmgraft.training.memory import Rank


def _rank(text: str) -> Rank:
    return "full" if text == "full" else int(text)


def main() -> None:
    """Print one line per stage."""
    parser = argparse.ArgumentParser(description="Operations, bytes, memory and seconds by stage; see docs/scale.md")
    parser.add_argument("model", help="folder or hub id of a VLM; only config.json is read")
    parser.add_argument("--rank", type=_rank, default="full", help="full, or directions per matrix")
    parser.add_argument("--gpus", type=int, default=1)
    parser.add_argument("--device", choices=("A100", "H100"), default="H100")
    arguments = parser.parse_args()
    model = Model.of(arguments.model, load_config(arguments.model))
    device = A100 if arguments.device == "A100" else H100
    print(f"{'stage':10}{'operations':>14}{'reads, GB':>12}{'writes, GB':>12}{'memory, GiB':>13}{'seconds':>10}")
    for one in stages(model, Work(rank=arguments.rank, gpus=arguments.gpus), device):
        disk = f"{one.read / 1e9:12.2f}{one.written / 1e9:12.2f}"
        print(f"{one.name:10}{one.operations:14.3g}{disk}{one.memory / 2**30:13.2f}{one.seconds:10.1f}")


if __name__ == "__main__":
    main()
