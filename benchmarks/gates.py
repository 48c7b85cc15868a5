"""Time gated projections, forward and backward, against the frozen ones: one matrix, or a whole decoder layer.

    python benchmarks/gates.py --shape 2048 2048 --tokens 1024 --ranks 2048 256
    python benchmarks/gates.py --layer 3B --tokens 1024 --ranks 2048 256 --out benchmarks/results/gates-3B.txt
    python benchmarks/gates.py --device cuda --layer 7B --tokens 1024 4096

The frozen side's backward pass is the gradient of its input only: 4·tokens·out·in operations together. `floor` is what
the factored operations are to the frozen ones: (mn + r(m + n)) / mn. `auto` is what `choose_backend` takes. Targets for
a model's step: factored ≤ 2.6 at full rank, ≤ 1.2 at rank 256, at 1,024 tokens or more in bfloat16. A model's step is a
layer's (`--layer`: transformers' Qwen2.5 decoder layer, random weights); of a single square matrix the floor is 3.
"""

from __future__ import annotations

import argparse
import shlex
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from vlmgraft.distillation.gated_layers import gated
from vlmgraft.distillation.projections import FactoredProjection, RebuiltProjection, choose_backend, gated_naive
from vlmgraft.spectral.factors import Factors

# hidden, feed-forward, heads, key-value heads: Qwen2.5-VL's language models
LAYERS = {"tiny": (64, 128, 4, 2), "3B": (2048, 11008, 16, 2), "7B": (3584, 18944, 28, 4), "32B": (5120, 27648, 40, 8)}


def seconds(runs: dict[str, Callable[[], object]], device: str, repeats: int) -> dict[str, float]:
    """Median wall time of each, taken in turns so that a busy moment hits all alike, after a turn not counted."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(repeats + 1):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            if device != "cpu":
                torch.cuda.synchronize()
            times[name].append(time.perf_counter() - start)
    return {name: statistics.median(found[1:]) for name, found in times.items()}


def matrix(out: int, inner: int, tokens: int, rank: int, options: dict[str, Any]) -> dict[str, Callable[[], object]]:
    """Frozen and gated runs of one matrix."""
    weight = torch.randn(out, inner, **options)
    U, Vh = torch.randn(out, rank, **options), torch.randn(rank, inner, **options)
    logits = torch.zeros(rank, device=options["device"], requires_grad=True)
    x = torch.randn(1, tokens, inner, **options).requires_grad_()
    grad = torch.randn(1, tokens, out, **options)

    def step(function: Callable[..., torch.Tensor]) -> None:
        y = function(x, weight, None, U, 0.01 * logits.sigmoid(), Vh)
        torch.autograd.grad(y, (x, logits), grad)

    return {
        "frozen": lambda: torch.autograd.grad(F.linear(x, weight), x, grad),
        "autograd": lambda: step(gated_naive),
        "factored": lambda: step(FactoredProjection.apply),
        "rebuilt": lambda: step(RebuiltProjection.apply),
    }


def decoder_layer(size: str, options: dict[str, Any]) -> torch.nn.Module:
    """Transformers' Qwen2 decoder layer (the text part of Qwen2.5-VL) at a model's sizes, random and frozen."""
    from transformers import Qwen2Config
    from transformers.models.qwen2.modeling_qwen2 import Qwen2DecoderLayer

    hidden, inner, heads, keys = LAYERS[size]
    config = Qwen2Config(
        hidden_size=hidden, intermediate_size=inner, num_attention_heads=heads, num_key_value_heads=keys,
        num_hidden_layers=1, attn_implementation="sdpa",
    )  # fmt: skip
    return Qwen2DecoderLayer(config, 0).to(**options).requires_grad_(False).eval()


def layer(block: Any, tokens: int, rank: int, options: dict[str, Any]) -> dict[str, Callable[[], object]]:
    """Frozen and gated runs of a decoder layer; gates of all seven projections are one vector."""
    hidden = block.hidden_size
    x = torch.randn(1, tokens, hidden, **options).requires_grad_()
    grad = torch.randn(1, tokens, hidden, **options)
    size = block.self_attn.head_dim
    angles = torch.rand(1, tokens, size, device=options["device"])
    places = (angles.cos().to(options["dtype"]), angles.sin().to(options["dtype"]))
    linears = {name: one for name, one in block.named_modules() if isinstance(one, torch.nn.Linear)}
    factors = {}
    for name, one in linears.items():
        (out, inner), r = one.weight.shape, min(rank, *one.weight.shape)
        parts = (torch.randn(out, r, **options), torch.ones(r), torch.randn(r, inner, **options))
        factors[name] = Factors(name, name, *parts, 1.0, 0.0)
    sizes = [len(one.s) for one in factors.values()]
    logits = torch.zeros(sum(sizes), device=options["device"], requires_grad=True)

    def forward() -> torch.Tensor:
        y = block(x, position_embeddings=places, attention_mask=None)
        return y[0] if isinstance(y, tuple) else y

    def step(backend: Any) -> Callable[[], None]:
        def run() -> None:
            with gated(block, linears, factors, backend) as layers:
                layers.set(dict(zip(factors, (0.01 * logits.sigmoid()).split(sizes), strict=True)))
                torch.autograd.grad(forward(), (x, logits), grad)

        return run

    return {"frozen": lambda: torch.autograd.grad(forward(), x, grad), "factored": step("factored"),
            "rebuilt": step("rebuilt")}  # fmt: skip


def floor(shapes: list[tuple[int, int]], rank: int) -> float:
    """Factored operations ÷ frozen operations."""
    work = [(m * n, min(rank, m, n) * (m + n)) for m, n in shapes]
    return sum(mn + more for mn, more in work) / sum(mn for mn, _ in work)


def main() -> None:
    """Print the table, and write it to --out with the command that made it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", type=int, nargs=2, default=[2048, 2048], metavar=("OUT", "IN"))
    parser.add_argument("--layer", choices=LAYERS, help="a whole decoder layer of this model in place of one matrix")
    parser.add_argument("--tokens", type=int, nargs="+", default=[256, 1024, 4096])
    parser.add_argument("--ranks", type=int, nargs="*", default=[])
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    options: dict[str, Any] = {"device": arguments.device, "dtype": getattr(torch, arguments.dtype)}
    block = decoder_layer(arguments.layer, options) if arguments.layer else None
    shapes = [tuple(arguments.shape)]
    if block is not None:
        shapes = [tuple(one.weight.shape) for one in block.modules() if isinstance(one, torch.nn.Linear)]
    what = f"decoder layer of {arguments.layer}" if block is not None else f"matrix {shapes[0][0]} × {shapes[0][1]}"
    lines = [
        f"python benchmarks/gates.py {shlex.join(sys.argv[1:])}",
        f"{what}; {arguments.device}, {torch.get_num_threads()} threads, torch {torch.__version__}, {arguments.dtype}",
        f"{'tokens':>7} {'rank':>6} {'frozen ms':>10} {'autograd':>9} {'factored':>9} {'floor':>6} {'rebuilt':>8} auto",
    ]
    print("\n".join(lines), flush=True)
    full = max(min(shape) for shape in shapes)
    for rank in arguments.ranks or [full, 256]:
        for tokens in arguments.tokens:
            runs = layer(block, tokens, rank, options) if block else matrix(*shapes[0], tokens, rank, options)
            found = seconds(runs, arguments.device, arguments.repeats)
            base = found["frozen"]
            naive = f"{found['autograd'] / base:9.2f}" if "autograd" in found else " " * 9
            chosen = {choose_backend(tokens, shape, min(rank, *shape)) for shape in shapes}
            lines.append(
                f"{tokens:>7} {rank:>6} {1e3 * base:10.2f} {naive} {found['factored'] / base:9.2f} "
                f"{floor(shapes, rank):6.2f} {found['rebuilt'] / base:8.2f} {', '.join(sorted(chosen))}"
            )
            print(lines[-1], flush=True)
    if arguments.out:
        arguments.out.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
