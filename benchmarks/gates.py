"""Time one gated projection, forward and backward, against the frozen linear layer.

    python benchmarks/gates.py --shape 2048 2048 --tokens 1024 --ranks 2048 256
    python benchmarks/gates.py --device cuda --dtype bfloat16 --shape 3584 3584 --tokens 256 1024 4096

The frozen layer's backward pass is the gradient of its input only: 4·tokens·out·in operations together. `auto` is what
`choose_backend` takes. Targets: factored ≤ 2.6 at full rank, ≤ 1.2 at rank 256, at 1,024 tokens or more in bfloat16.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F

from vlmgraft.training.projections import FactoredProjection, RebuiltProjection, choose_backend, gated_naive


def seconds(run: Callable[[], object], device: str, repeats: int) -> float:
    """Median wall time of one call, after two that are not counted."""
    times = []
    for _ in range(repeats + 2):
        start = time.perf_counter()
        run()
        if device != "cpu":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return statistics.median(times[2:])


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", type=int, nargs=2, default=[2048, 2048], metavar=("OUT", "IN"))
    parser.add_argument("--tokens", type=int, nargs="+", default=[256, 1024, 4096])
    parser.add_argument("--ranks", type=int, nargs="*", default=[])
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    out, inner = arguments.shape
    options = {"device": arguments.device, "dtype": getattr(torch, arguments.dtype)}
    print(f"{arguments.device}, {torch.get_num_threads()} threads, torch {torch.__version__}, {arguments.dtype}")
    print(f"{'tokens':>7} {'rank':>6} {'frozen ms':>10} {'autograd':>9} {'factored':>9} {'rebuilt':>8} auto")
    weight = torch.randn(out, inner, **options)
    for rank in arguments.ranks or [min(out, inner), 256]:
        U, Vh = torch.randn(out, rank, **options), torch.randn(rank, inner, **options)
        logits = torch.zeros(rank, device=arguments.device, requires_grad=True)
        for tokens in arguments.tokens:
            x = torch.randn(1, tokens, inner, **options).requires_grad_()
            grad = torch.randn(1, tokens, out, **options)

            def frozen(x: torch.Tensor = x, grad: torch.Tensor = grad) -> None:
                torch.autograd.grad(F.linear(x, weight), x, grad)

            def step(
                function: Callable[..., torch.Tensor],
                x: torch.Tensor = x,
                grad: torch.Tensor = grad,
                logits: torch.Tensor = logits,
                U: torch.Tensor = U,
                Vh: torch.Tensor = Vh,
            ) -> None:
                y = function(x, weight, None, U, 0.01 * logits.sigmoid(), Vh)
                torch.autograd.grad(y, (x, logits), grad)

            base = seconds(frozen, arguments.device, arguments.repeats)
            functions = (gated_naive, FactoredProjection.apply, RebuiltProjection.apply)
            ratios = [
                seconds(lambda f=f, s=step: s(f), arguments.device, arguments.repeats) / base  # type: ignore[misc]
                for f in functions
            ]
            print(
                f"{tokens:>7} {rank:>6} {1e3 * base:10.2f} {ratios[0]:9.2f} {ratios[1]:9.2f} {ratios[2]:8.2f} "
                f"{choose_backend(tokens, (out, inner), rank)}"
            )


if __name__ == "__main__":
    main()
