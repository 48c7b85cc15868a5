"""Single figures behind the cost of FRISM, each as a ratio or a count, measured against its peer in the same run.

    python benchmarks/pieces.py --out benchmarks/results/pieces.json
    python benchmarks/pieces.py --quick

- finite: is a matrix of a 7B model finite, by one norm against `isfinite` of donor and base
- padding: tokens that batches of mixed photographs read, padding included, over those that are there; in the training
  of gates, and in `evaluate`, which before it looked at their sizes sorted questions by their text
- pictures: image tokens of two photographs as they are and within the default of `calibration.max_pixels`, and what the
  pixels of 640 of them would take in memory against the features that are kept (Qwen2.5-VL-7B)
- bound: KL from the 64 likeliest tokens and a rest, a lower bound, its upper bound, and the KL of the whole vocabulary,
  of a student that differs from its teacher in the rest alone
- outside: one direction of a slowly falling spectrum that a single random vector finds: how far its singular value is
  off, whether the check inside its span passes, and what the check outside says
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers.models.qwen2_vl.image_processing_qwen2_vl import smart_resize

from vlmgraft.data.questions import Question
from vlmgraft.distillation.targets import Distribution
from vlmgraft.distillation.teacher import pack
from vlmgraft.evaluation.ask import BATCH_TOKENS, plan
from vlmgraft.merging.pieces import squared_norm
from vlmgraft.methods.calibration import Calibration
from vlmgraft.spectral.krylov import largest_outside, missed_outside
from vlmgraft.spectral.svd import from_columns, passes, probe

PHOTOGRAPHS = ((1600, 1200), (2448, 3264))
CELL, PATCHES, PATCH_VALUES, HIDDEN = 28, 4, 1176, 3584
"""Qwen2.5-VL-7B: pixels on a side of a token, patches to a token, float32 numbers of a patch, numbers of a feature."""
QUESTIONS = 640


def seconds(function: Callable[[], Any], repeats: int) -> float:
    """Of the fastest call."""
    times = []
    for _ in range(repeats):
        began = time.perf_counter()
        function()
        times.append(time.perf_counter() - began)
    return min(times)


def finite(quick: bool) -> dict[str, float]:
    """One norm, which is needed anyway, against a mask of each of two matrices."""
    shape = (189, 358) if quick else (18944, 3584)
    donor, base = (0.02 * torch.randn(shape) for _ in range(2))
    tau = (donor - base).reshape(-1)
    norm = seconds(lambda: squared_norm(tau), 3)
    masks = seconds(lambda: (torch.isfinite(donor).all(), torch.isfinite(base).all()), 3)
    return {"norm, seconds": norm, "isfinite of two, seconds": masks, "isfinite ÷ norm": masks / norm}


def padding() -> dict[str, float]:
    """Batches of 48 in a random order, against batches of the same tokens sorted by length."""
    generator = torch.Generator().manual_seed(0)
    sides = (224 * (2448 / 224) ** torch.rand(QUESTIONS, 2, generator=generator)).long().tolist()
    lengths = [tokens(width, height) + 40 for width, height in sides]
    questions = [Question("?", (Path("photograph.jpg"),))] * QUESTIONS
    limit = 48 * sum(lengths) // QUESTIONS

    def read(packing: Any, batch_tokens: int | None) -> float:
        batches = pack(questions, lengths, 48, packing, 0, batch_tokens)
        return sum(max(lengths[i] for i in batch) * len(batch) for batch in batches) / sum(lengths)

    return {
        "in any order": read("shuffle", None),
        "sorted, by tokens": read("length", limit),
        **evaluation_padding(sides, generator),
    }


def evaluation_padding(sides: list[list[int]], generator: torch.Generator) -> dict[str, float]:
    """The same photographs with questions of 10 to 200 tokens, as `evaluate` asks them by default."""
    words = torch.randint(10, 200, (len(sides),), generator=generator).tolist()
    questions = [Question("word " * count, (Path("photograph.jpg"),)) for count in words]
    lengths = [tokens(*size) + count for size, count in zip(sides, words, strict=True)]
    found = {}
    for name, known in (("asked by their text", ()), ("asked by their tokens", lengths)):
        planned = plan(questions, known, 32, BATCH_TOKENS)
        found[name] = sum(max(lengths[i] for i in batch) * len(batch) for batch in planned) / sum(lengths)
        found[f"largest batch, tokens, {name}"] = max(max(lengths[i] for i in batch) * len(batch) for batch in planned)
    return found


def tokens(width: int, height: int, pixels: int = 12_845_056) -> int:
    """Of an image within so many pixels, by the processor's own rounding."""
    rows, columns = smart_resize(height, width, factor=CELL, min_pixels=CELL * CELL, max_pixels=pixels)
    return rows * columns // CELL**2


def pictures() -> dict[str, dict[str, float]]:
    """Tokens, and GiB of 640 such images."""
    default, found = Calibration("").max_pixels, {}
    for width, height in PHOTOGRAPHS:
        whole, shrunk = tokens(width, height), tokens(width, height, default)
        found[f"{width}×{height}"] = {
            "tokens": whole,
            "tokens within max_pixels": shrunk,
            "GiB of pixels": QUESTIONS * whole * PATCHES * PATCH_VALUES * 4 / 2**30,
            "GiB of features within max_pixels": QUESTIONS * shrunk * HIDDEN * 2 / 2**30,
        }
    return found


def bound(quick: bool) -> dict[str, float]:
    """Nats per token, over 64 tokens; the teacher's rest turned round."""
    vocabulary = 5_000 if quick else 152_064
    logits = 2 * torch.randn(64, vocabulary, generator=torch.Generator().manual_seed(0))
    cut, whole = Distribution.of(logits), Distribution(logits.log_softmax(-1), None)
    assert cut.ids is not None
    student, rest = logits.clone(), torch.ones_like(logits, dtype=torch.bool).scatter(-1, cut.ids, False)
    student[rest] = logits[rest].view(64, -1).flip(-1).reshape(-1)
    kl = float(whole.kl(student).double().mean())
    lower, upper = cut.bounds(student).double().mean(1).tolist()
    return {"whole": kl, "from below": lower, "from above": upper}


def outside(quick: bool) -> dict[str, Any]:
    """A spectrum i^-0.2, and the direction into which τᵀτ turns one random vector."""
    count = 64 if quick else 512
    generator = torch.Generator().manual_seed(0)
    left, right = (torch.linalg.qr(torch.randn(2 * count, count, generator=generator))[0] for _ in range(2))
    values = torch.arange(1, count + 1).float() ** -0.2
    tau = (left * values) @ right.T
    V = torch.linalg.qr(tau.T @ (tau @ torch.randn(2 * count, 1, generator=generator)))[0]
    U, s, Vh = from_columns(tau, V)
    energy = float(tau.double().square().sum())
    return {
        "found ÷ largest": float(s[0] / values[0]),
        "check inside passes": bool(passes(probe(tau, U, s, Vh))),
        "largest outside ÷ largest": largest_outside(tau, Vh) / float(values[0]),
        "check outside passes": missed_outside(tau, U, s, Vh, energy) is not None,
    }


def main() -> None:
    """Parse the command line, measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="small matrices")
    parser.add_argument("--out", type=Path, help="a JSON file")
    options = parser.parse_args()
    rows = {
        "finite": finite(options.quick),
        "padding": padding(),
        "pictures": pictures(),
        "bound": bound(options.quick),
        "outside": outside(options.quick),
    }
    about = {"command": " ".join(["python", *sys.argv]), "torch": torch.__version__, "cores": os.cpu_count()}
    about |= {"load average": [round(one, 1) for one in os.getloadavg()], "python": platform.python_version()}
    text = json.dumps({"about": about, **rows}, indent=1, ensure_ascii=False)
    print(text)
    if options.out:
        options.out.write_text(text + "\n")


if __name__ == "__main__":
    main()
