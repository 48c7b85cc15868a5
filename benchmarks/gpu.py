"""Everything that a card must show, in one command of at most eight minutes, without a network.

    python benchmarks/gpu.py                      # one card, shapes of Qwen2.5-VL-7B, made-up weights
    python benchmarks/gpu.py --quick --out x.json # seconds on the CPU: does it run?

First the device's results are held against a CPU twin in float64 at small shapes; where one is off the command fails.
Then, at the true shapes: decompositions against torch's own SVD, a batch of images through the vision tower, answers
about them against reading their prompts, gate steps in both forms against a plain forward and backward pass, folds on
the device and on the CPU, a training step with DRIFT's prior against one without, and a streamed merge against `cp`.
Every row has seconds, the ratio to what it is measured against, and on a GPU the peak of its memory (of a merge the
host's). Rows go to benchmarks/results/gpu-NAME.json. After `--minutes` no further stage and no further row begins, and
the row in hand is not repeated; what was left out is named.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parent))
import drift as drift_benchmark
import merge as merge_benchmark
from made_up_vlm import FIRST_WORD, SIZES, TOWERS, model_of, prompts, random_factors
from svd import task_vector

from vlmgraft.distillation.gate_vector import GateVector
from vlmgraft.distillation.gated_layers import gated
from vlmgraft.distillation.projections import FactoredProjection, RebuiltProjection, gated_naive
from vlmgraft.distillation.targets import Distribution, TargetBatch
from vlmgraft.hf.modules import text_linears
from vlmgraft.methods.frism import fold
from vlmgraft.spectral.factors import Factors, factorize
from vlmgraft.spectral.svd import decompose_matrix, decompose_naive

RESULTS = Path(__file__).parent / "results"
Row = dict[str, Any]


class Bench:
    """The device, the sizes, the time there is, rows as they are made and the names of those left out."""

    def __init__(self, device: torch.device, size: str, minutes: float) -> None:
        self.device, self.size, self.sizes = device, size, SIZES[size]
        self.dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        self.end = time.monotonic() + 60 * minutes
        self.rows: list[Row] = []
        self.left_out: list[str] = []

    def late(self, what: str) -> bool:
        """Whether the time is over; `what` is left out then."""
        over = time.monotonic() > self.end
        if over:
            self.left_out.append(what)
        return over

    def time(self, what: str, run: Callable[[], object], against: float | None = None, **notes: Any) -> float | None:
        """Median seconds of a call after one that is not counted; a row with the ratio to `against` seconds. None
        where the time is over before; where it ends in between, fewer calls are counted, one at least."""
        if self.late(what):
            return None
        cuda = self.device.type == "cuda"
        seconds: list[float] = []
        while len(seconds) <= self.sizes["repeats"] and (len(seconds) < 2 or time.monotonic() <= self.end):
            if cuda and len(seconds) == 1:
                torch.cuda.reset_peak_memory_stats(self.device)
            began = time.perf_counter()
            run()
            if cuda:
                torch.cuda.synchronize(self.device)
            seconds.append(time.perf_counter() - began)
        median = statistics.median(seconds[1:])
        memory = torch.cuda.max_memory_allocated(self.device) if cuda else None
        self.add(what, median, against, memory, counted=len(seconds) - 1, **notes)
        return median

    def add(self, what: str, seconds: float, against: float | None, memory: int | None, **notes: Any) -> None:
        """Keep and print a row."""
        ratio = None if against is None else seconds / against
        self.rows.append({"what": what, "seconds": seconds, "ratio": ratio, "memory": memory, **notes})
        held = "" if memory is None else f"{memory / 2**30:8.2f} GiB"
        print(f"{what:58} {seconds:10.4f} s {'' if ratio is None else f'{ratio:7.2f} ×'} {held}", flush=True)


def check(bench: Bench) -> None:
    """Results of the device against float64 on the CPU, at small shapes; raises SystemExit where one is off."""
    tau = task_vector((96, 40), "cpu")
    expected = decompose_naive(tau)
    for rank, tolerance in (("full", 1e-5), (6, 1e-3)):
        made = decompose_matrix(tau.to(bench.device), rank)  # type: ignore[arg-type]
        s = expected.s[: len(made.s)]
        _close(f"singular values, rank {rank}", made.s, s, tolerance)
        update, twin = (one.U[:, : len(s)] * one.s[: len(s)] @ one.Vh[: len(s)] for one in (made, expected))
        _close(f"τ from the factors, rank {rank}", update, twin, 10 * tolerance)
    generator = torch.Generator().manual_seed(1)
    x, weight, U, Vh = (torch.randn(*shape, generator=generator, dtype=torch.float64)
                        for shape in ((3, 20, 40), (96, 40), (96, 8), (8, 40)))  # fmt: skip
    spectrum = torch.rand(8, generator=generator, dtype=torch.float64)
    twin = _gradients(gated_naive, x, weight, U, spectrum, Vh)
    for function in (FactoredProjection.apply, RebuiltProjection.apply):
        on_device = [tensor.to(bench.device, torch.float32) for tensor in (x, weight, U, spectrum, Vh)]
        for name, ours, theirs in zip(
            ("y", "x.grad", "spectrum.grad"), _gradients(function, *on_device), twin, strict=True
        ):
            _close(f"gated projection, {name}", ours, theirs, 1e-4)
    factors = Factors("w", "w", U.float(), spectrum.float(), Vh.float(), 1.0, 0.0)
    moved = factors.to(bench.device)
    folded = fold(weight.float().to(bench.device), moved, moved.s)
    _close("fold", folded, weight + (U * spectrum) @ Vh, 1e-5)


def _gradients(function: Any, x: Any, weight: Any, U: Any, spectrum: Any, Vh: Any) -> tuple[torch.Tensor, ...]:
    x, spectrum = x.clone().requires_grad_(), spectrum.clone().requires_grad_()
    y = function(x, weight, None, U, spectrum, Vh)
    return (y, *torch.autograd.grad(y.square().sum(), (x, spectrum)))


def _close(what: str, ours: torch.Tensor, twin: torch.Tensor, tolerance: float) -> None:
    error = float((ours.detach().double().cpu() - twin.detach().double().cpu()).norm() / twin.detach().double().norm())
    print(f"check: {what:40} {error:.1e}")
    if not error <= tolerance:
        raise SystemExit(f"{what}: {error:.1e} off the CPU's result, {tolerance:.0e} is allowed")


def decompositions(bench: Bench) -> None:
    """One matrix of every shape: torch's SVD, ours in full and to the rank; the whole model by counting."""
    sizes = bench.sizes
    found: dict[str, list[float | None]] = {"full": [], "rank": []}
    narrow = sizes["hidden"] * sizes["keys"] // sizes["heads"]
    counts = {(sizes["hidden"], sizes["hidden"]): 2, (narrow, sizes["hidden"]): 2, (sizes["inner"], sizes["hidden"]): 3}
    for shape, count in counts.items():
        tau, base = task_vector(shape, str(bench.device)), None
        if shape[0] <= sizes["hidden"]:  # torch's own of the widest takes minutes
            base = bench.time(f"torch.linalg.svd {shape}", lambda tau=tau: torch.linalg.svd(tau, full_matrices=False))
        for key, rank in (("full", "full"), ("rank", sizes["rank"])):
            seconds = bench.time(f"decompose {shape}, rank {rank}", partial(decompose_matrix, tau, rank), base)
            found[key].append(None if seconds is None else count * sizes["layers"] * seconds)
    for key, parts in found.items():
        what, known = f"decompose the whole model, {key}, by counting", [one for one in parts if one is not None]
        if len(known) == len(parts):
            bench.add(what, sum(known), None, None)
        else:
            bench.left_out.append(what)


def steps(bench: Bench) -> None:
    """Everything that needs the model."""
    model = model_of(bench.size, bench.device, bench.dtype)
    answers(bench, model)
    if not bench.late("gate steps"):
        gate_steps(bench, model)


def answers(bench: Bench, model: Any) -> None:
    """A batch of images encoded, its prompts read, images included, and answered."""
    sizes = bench.sizes
    batch = prompts(bench.size, sizes["answered"], bench.device, bench.dtype)
    images = {key: batch[key] for key in ("pixel_values", "image_grid_thw")}
    options = {"max_new_tokens": sizes["answer"], "do_sample": False, "pad_token_id": 0}
    what = f"{sizes['answered']} prompts of {sizes['prompt']} tokens"
    each = sizes["rows"] * sizes["columns"]
    with torch.no_grad():
        bench.time(f"encode {sizes['answered']} images of {each} tokens", lambda: model.get_image_features(**images))
        read = bench.time(f"read {what}", lambda: model(**batch, logits_to_keep=1))
    bench.time(f"answer {what}", lambda: model.generate(**batch, **options), read, tokens=sizes["answer"])


def gate_steps(bench: Bench, model: Any) -> None:
    """A plain forward and backward pass of the text model, and gate steps in both forms."""
    sizes, length = bench.sizes, bench.sizes["prompt"] + bench.sizes["answer"]
    ids = torch.randint(FIRST_WORD, sizes["words"], (sizes["batch"], length), device=bench.device)
    captured = {"inputs_embeds": model.get_input_embeddings()(ids).detach(), "use_cache": False}
    predicts = torch.zeros(ids.shape, dtype=torch.bool)
    predicts[:, sizes["prompt"] :] = True
    batch = TargetBatch(ids.cpu(), dict, captured, predicts, Distribution(torch.empty(0), None))
    with torch.no_grad():
        target = batch.distribution(model)
    batch = TargetBatch(ids.cpu(), dict, captured, predicts, target)
    x = captured["inputs_embeds"].clone().requires_grad_()
    whole = TargetBatch(ids.cpu(), dict, {**captured, "inputs_embeds": x}, predicts, target)
    plain = bench.time("plain forward and backward", lambda: torch.autograd.grad(whole.kl(model).mean(), x))
    factors = random_factors(model, min(sizes["rank"], sizes["hidden"]))
    for backend in ("factored", "rebuilt"):
        with gated(model, text_linears(model), factors, backend) as layers:  # type: ignore[arg-type]
            vector = GateVector(factors, device=bench.device)

            def step(layers: Any = layers, vector: GateVector = vector) -> None:
                layers.set(vector.spectra(1.0)[0])
                torch.autograd.grad(batch.kl(model).mean(), vector.logits)

            bench.time(f"gate step, {backend}, rank {sizes['rank']}", step, plain)


def folds(bench: Bench) -> None:
    """The widest matrix folded on the device, against the CPU."""
    sizes = bench.sizes
    tau = task_vector((sizes["inner"], sizes["hidden"]), str(bench.device))
    factors, weight = factorize(tau, "w", "w", sizes["rank"]), torch.randn_like(tau)
    on_cpu, held = factors.to("cpu"), weight.cpu()
    base = bench.time("fold the widest matrix on the CPU", lambda: fold(held, on_cpu, on_cpu.s))
    bench.time("fold the widest matrix", lambda: fold(weight, factors, factors.s), base)


def tuning(bench: Bench) -> None:
    """A step of fine-tuning with DRIFT's prior against one without."""
    sizes, cuda = bench.sizes, bench.device.type == "cuda"
    for modules in drift_benchmark.MODULES:
        if bench.late(f"DRIFT step, {modules}"):
            continue
        if cuda:
            torch.cuda.reset_peak_memory_stats(bench.device)
        (row,) = drift_benchmark.measure(
            sizes["hidden"], sizes["drift_layers"], sizes["batch"], min(sizes["prompt"], 256), sizes["drift_steps"],
            bench.device.type, "device", (modules,),
        )  # fmt: skip
        memory = torch.cuda.max_memory_allocated(bench.device) if cuda else None
        bench.add(f"DRIFT step, {modules}", row["step"] * (1 + row["added"]), row["step"], memory)


def merging(bench: Bench) -> None:
    """A streamed task-arithmetic merge against `cp`, of files in the page cache."""
    gigabytes = 0.002 if bench.sizes["hidden"] < 512 else 1.0
    with tempfile.TemporaryDirectory() as folder:
        rows = merge_benchmark.compare(
            Path(folder) / "merge", gigabytes, ["cp", "task_arithmetic"], bench.sizes["repeats"], 2
        )
    cp, merged = ({row["case"]: row for row in rows}[case] for case in ("cp", "task_arithmetic"))
    bench.add("cp of a checkpoint", cp["seconds"], None, None, bytes=cp["bytes"])
    bench.add("merge, task arithmetic", merged["seconds"], cp["seconds"], None, host_memory=merged["memory"])


STAGES: dict[str, Callable[[Bench], None]] = {
    "decompositions": decompositions, "steps": steps, "folds": folds, "tuning": tuning, "merging": merging,
}  # fmt: skip


def run(bench: Bench) -> None:
    """All stages in turn until the time is over."""
    for name, stage in STAGES.items():
        if bench.late(name):
            continue
        stage(bench)
        if bench.device.type == "cuda":
            torch.cuda.empty_cache()


def main() -> None:
    """Check, measure, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="tiny shapes, on the CPU where there is no card")
    parser.add_argument("--minutes", type=float, default=7.0, help="after which no further row begins")
    parser.add_argument("--out", type=Path, help="default: benchmarks/results/gpu-NAME.json")
    arguments = parser.parse_args()
    cuda = torch.cuda.is_available()
    if not cuda and not arguments.quick:
        raise SystemExit("no card: run it where torch.cuda.is_available(), or with --quick on the CPU")
    device = torch.device("cuda" if cuda else "cpu")
    name = torch.cuda.get_device_name(device) if cuda else "CPU"
    torch.manual_seed(0)
    bench = Bench(device, "quick" if arguments.quick else "7B", arguments.minutes)
    check(bench)
    run(bench)
    if bench.left_out:
        print(f"left out after {arguments.minutes:g} minutes: {', '.join(bench.left_out)}")
    out = arguments.out or RESULTS / f"gpu-{re.sub(r'[^A-Za-z0-9]+', '-', name).strip('-')}.json"
    about = {
        "device": name,
        "torch": torch.__version__,
        "command": " ".join(["python", *sys.argv]),
        "sizes": bench.sizes,
        "tower": TOWERS[bench.size],
    }
    out.write_text(json.dumps({**about, "left_out": bench.left_out, "rows": bench.rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
