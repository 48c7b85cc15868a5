"""What is left of a small merge after rounding to bfloat16: effective λ by method, λ and size of the task vector.

    python benchmarks/rounding.py --out benchmarks/results/rounding.json
    python benchmarks/rounding.py --quick

Two questions. Of matrices with the size, the spread and the spectrum that fine-tuned models show, how much of λτ does
the file hold when it is rounded to nearest, and does a rank-one update of the same norm keep more of it? And on the
lab's trio, merged to nearest, stochastically and in float32, what does that do to the scores?

The matrices are made: W is normal, τ has ‖τ‖/‖W‖ as asked, random singular vectors and singular values s_i ∝ i^−p with
p fitted to a share of energy in the first direction. Weights of real models have heavier tails than the normal, so that
these figures show the mechanism, not a model's loss; every merge writes its own effective λ into its receipt.
"""

from __future__ import annotations

import argparse
import json
import platform
import tempfile
from pathlib import Path
from typing import Any

import torch
from scipy.optimize import brentq
from torch import Tensor

SCALES = (0.05, 0.1, 0.25, 0.5, 1.0)
RATIOS = (0.005, 0.008, 0.02, 0.1)
FIRST = 0.10
"""Energy of the first direction; on SmolLM2-135M a supervised donor had 0.08 (down) to 0.22 (o)."""


def singular_values(count: int, first: float) -> Tensor:
    """s_i ∝ i^−p of unit norm, with s_1² = `first`."""
    ranks = torch.arange(1, count + 1, dtype=torch.float64)
    power = brentq(lambda p: float(1 / ranks.pow(-2 * p).sum()) - first, 1e-3, 5)
    values = ranks.pow(-power)
    return values / values.norm()


def made(shape: tuple[int, int], ratio: float, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """W in bfloat16, τ, and τ's first direction at τ's norm, float32."""
    weight = (0.02 * torch.randn(shape, generator=generator)).bfloat16()
    left = torch.linalg.qr(torch.randn(shape[0], min(shape), generator=generator))[0]
    right = torch.linalg.qr(torch.randn(shape[1], min(shape), generator=generator))[0]
    size = ratio * float(weight.float().norm())
    tau = size * (left * singular_values(min(shape), FIRST).float()) @ right.T
    return weight, tau, size * torch.outer(left[:, 0], right[:, 0])


def kept(weight: Tensor, change: Tensor) -> dict[str, float]:
    """Effective λ (1: all of the change), noise and share of changed entries after rounding to nearest."""
    written = (weight.float() + change).bfloat16().double() - weight.double()
    meant = change.double()
    effective = float((written * meant).sum() / meant.square().sum())
    noise = float((written - effective * meant).norm() / meant.norm())
    return {"effective": effective, "noise": noise, "changed": float((written != 0).double().mean())}


def matrices(shape: tuple[int, int], seed: int) -> list[dict[str, Any]]:
    """A row per size of τ, λ and update."""
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for ratio in RATIOS:
        weight, tau, rank_one = made(shape, ratio, generator)
        for scale in SCALES:
            for update, change in (("task arithmetic", tau), ("rank one, norm-matched", rank_one)):
                facts = kept(weight, scale * change)
                rows.append({"part": "matrix", "ratio": ratio, "scale": scale, "update": update, **facts})
    return rows


def merges(scales: tuple[float, ...], items: int) -> list[dict[str, Any]]:
    """A row per method, λ and way of writing on the lab's trio, scored on the test split."""
    from transformers import AutoModelForImageTextToText

    import vlmgraft as vg
    from vlmgraft.hf.models import load_processor
    from vlmgraft.lab import trio_path, world
    from vlmgraft.lab.exam import draw_exam

    trio = trio_path()
    exam = draw_exam(1, "test", {"sum": items, **dict.fromkeys(world.PERCEPTION, max(1, items // 4))})
    methods = {
        "task arithmetic": {"name": "task_arithmetic"},
        "rank one, norm-matched": {"name": "spectral", "rule": "rank_k", "rank": 1},
    }
    writings = {"nearest": {}, "stochastic": {"rounding": "stochastic"}, "float32": {"dtype": "float32"}}
    sources = {"vlm": str(trio / "vlm"), "donor": str(trio / "donor"), "donor_base": str(trio / "base")}
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for update, method in methods.items():
            for scale in scales:
                for writing, output in writings.items():
                    out = Path(folder) / f"{method['name']}-{scale}-{writing}"
                    receipt = vg.merge(sources | {"method": method | {"scale": scale}, "output": output}, out)
                    model = AutoModelForImageTextToText.from_pretrained(out, dtype=torch.float32).eval()
                    marks = exam.mark(model, load_processor(out))
                    row = {"part": "lab", "update": update, "scale": scale, "writing": writing}
                    row |= {"effective": receipt.effective, "noise": receipt.noise, "changed": receipt.changed}
                    row |= {"reasoning": marks.reasoning.mean, "perception": marks.perception.mean}
                    rows.append(row)
                    print(json.dumps(row), flush=True)
    return rows


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="small matrices, one λ and few items")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    rows = matrices((96, 64) if arguments.quick else (2048, 1024), arguments.seed)
    for row in rows:
        print(json.dumps(row), flush=True)
    rows += merges((0.05,), 8) if arguments.quick else merges((0.05, 0.1, 0.25), 400)
    if arguments.out:
        command = f"python benchmarks/rounding.py --seed {arguments.seed} --out {arguments.out}"
        versions = {"torch": torch.__version__, "machine": platform.processor() or platform.machine()}
        arguments.out.write_text(json.dumps({"command": command, **versions, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
