"""Time `decompose_matrix` against torch.linalg.svd on matrices of 3B and 7B models, and predict whole models.

    python benchmarks/svd.py                          # 3B's shapes
    python benchmarks/svd.py --model 7B --device cuda
    python benchmarks/svd.py --model tiny             # seconds: does it run?

The matrices are synthetic task vectors: a decaying spectrum plus noise, rounded to bfloat16. Prints one row per shape
and rank (median of `--repeats`), the ratio to gesdd, and the predicted time of the full decomposition of 3B, 7B and 32B
models on this machine, one matrix at a time.
"""

from __future__ import annotations

import argparse
import shlex
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

from vlmgraft.spectral.svd import Rank, decompose_matrix, matrix_cost

# hidden, feed-forward, width of keys and values, layers: Qwen2.5-VL's language models
MODELS = {
    "tiny": (128, 256, 64, 4),
    "3B": (2048, 11008, 256, 36),
    "7B": (3584, 18944, 512, 28),
    "32B": (5120, 27648, 1024, 64),
}


def shapes(model: str) -> dict[tuple[int, int], int]:
    """Shape [out, in] of every projection and how many a model has."""
    hidden, inner, narrow, layers = MODELS[model]
    per_layer = {(hidden, hidden): 2, (narrow, hidden): 2, (inner, hidden): 2, (hidden, inner): 1}
    return {shape: count * layers for shape, count in per_layer.items()}


def task_vector(shape: tuple[int, int], device: str) -> torch.Tensor:
    """Low-rank part with a decaying spectrum, plus noise, as bfloat16 differences are."""
    generator = torch.Generator().manual_seed(0)
    rank = min(64, *shape)
    left, right = torch.randn(shape[0], rank, generator=generator), torch.randn(rank, shape[1], generator=generator)
    decay = torch.arange(1, rank + 1).float() ** -0.7
    tau = 1e-4 * ((left * decay) @ right) + 1e-4 * torch.randn(shape, generator=generator)
    return tau.bfloat16().float().to(device)


def seconds(run: Callable[[], object], device: str, repeats: int) -> float:
    """Median wall time of one call, after one call that is not counted on a GPU."""
    times = []
    for _ in range(repeats + (device != "cpu")):
        start = time.perf_counter()
        run()
        if device != "cpu":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return statistics.median(times[-repeats:])


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=[name for name in MODELS if name != "32B"], default="3B")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--ranks", type=int, nargs="*", default=[64, 256])
    parser.add_argument("--out", type=Path, help="write the table there too")
    arguments = parser.parse_args()
    lines: list[str] = []

    def say(line: str) -> None:
        print(line, flush=True)
        lines.append(line)

    say(f"python benchmarks/svd.py {shlex.join(sys.argv[1:])}")
    say(f"{arguments.device}, {torch.get_num_threads()} threads, torch {torch.__version__}")
    say(f"{'shape':>14} {'rank':>6} {'gesdd s':>9} {'ours s':>9} {'ratio':>6} {'error':>9} {'kept':>7} route")
    per_cost = []
    for shape in shapes(arguments.model):
        tau = task_vector(shape, arguments.device)
        base = seconds(lambda t=tau: torch.linalg.svd(t, full_matrices=False), arguments.device, arguments.repeats)
        ranks: list[Rank] = ["full", *[rank for rank in arguments.ranks if 5 * rank <= min(shape)]]
        for rank in ranks:
            found = decompose_matrix(tau, rank)
            own = seconds(lambda t=tau, r=rank: decompose_matrix(t, r), arguments.device, arguments.repeats)
            if rank == "full":
                per_cost.append((matrix_cost(shape), own))
            say(
                f"{shape[0]:>6} × {shape[1]:<5} {rank:>6} {base:9.2f} {own:9.2f} {own / base:6.2f} "
                f"{found.error:9.1e} {found.kept:7.4f} {found.route}"
            )
    rate = sum(own for _, own in per_cost) / sum(cost for cost, _ in per_cost)
    for model in ("3B", "7B", "32B"):
        total = sum(count * matrix_cost(shape) * rate for shape, count in shapes(model).items())
        say(f"predicted, {model}, full rank: {total / 60:.0f} minutes on this device")
    if arguments.out:
        arguments.out.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
