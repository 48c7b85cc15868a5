"""What DRIFT's prior adds to a training step, against the same trainer without it.

    python benchmarks/drift.py --quick                     models of the lab's size and of 14 M, on the CPU
    python benchmarks/drift.py --device cuda --hidden 2048 --layers 16 --tokens 1024

Both trainings take turns in blocks of steps, so that a change of the machine's load meets both; the figure is the
median over blocks of the median step. Target: at most 10 % on top.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import Qwen2Config, Qwen2ForCausalLM, Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_callback import PrinterCallback

from vlmgraft.finetuning.callback import DriftCallback
from vlmgraft.finetuning.prior import Delta, Prior, PushRule

BLOCKS = 3
MODULES = ("attention", "attention+mlp")


def model_of(hidden: int, layers: int, device: str) -> Any:
    """A text model of the lab's kind; the push does not look at the tower."""
    heads = max(2, hidden // 64)
    sizes = {"hidden_size": hidden, "intermediate_size": 3 * hidden, "num_hidden_layers": layers}
    config = Qwen2Config(**sizes, num_attention_heads=heads, num_key_value_heads=heads // 2, vocab_size=1024)
    return Qwen2ForCausalLM(config).to(device)


def random_prior(model: Any, modules: str, store: Any) -> Prior:
    """A random Δ for every projection, at a tenth of the weights' size, in bfloat16."""
    deltas = {}
    for name, weight in model.named_parameters():
        group = "attention" if "self_attn" in name else "mlp"
        if name.endswith("_proj.weight") and (modules == "attention+mlp" or group == modules):
            value = (0.1 * weight.std() * torch.randn_like(weight)).detach().bfloat16().cpu()
            role = name.removeprefix("model.")
            deltas[name] = Delta(
                name, role, group, value, float(value.float().norm()), 0.0, float(weight.detach().norm())
            )
    return Prior(PushRule(), deltas, (), store)


class Clock(TrainerCallback):
    """Seconds of every optimiser step, from its beginning to its end; all devices are waited for."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        self.start = _now()

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self.seconds.append(_now() - self.start)


def _now() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def median_step(model: Any, batch: int, tokens: int, steps: int, drift: DriftCallback | None, device: str) -> float:
    """Median step of one short training, after two that are not counted."""
    ids = torch.randint(1024, (batch * (steps + 2), tokens)).tolist()
    rows = [{"input_ids": row, "labels": row} for row in ids]
    clock = Clock()
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder,
            per_device_train_batch_size=batch,
            max_steps=steps + 2,
            learning_rate=1e-6,
            logging_steps=10,
            report_to=[],
            disable_tqdm=True,
            save_strategy="no",
            use_cpu=device == "cpu",
            bf16=device != "cpu",
        )
        trainer = Trainer(model, arguments, collate, train_dataset=rows, callbacks=[clock, *([drift] if drift else [])])
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    return statistics.median(clock.seconds[2:])


def collate(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """Rows of one length as a batch."""
    return {key: torch.tensor([row[key] for row in rows]) for key in rows[0]}


def measure(
    hidden: int,
    layers: int,
    batch: int,
    tokens: int,
    steps: int,
    device: str,
    store: str,
    choices: Sequence[str] = MODULES,
) -> list[dict]:
    """Rows: one per choice of modules."""
    torch.manual_seed(0)
    model, found = model_of(hidden, layers, device), []
    for modules in choices:
        prior = random_prior(model, modules, store)
        ratios, plain = [], []
        for _ in range(BLOCKS):
            plain.append(median_step(model, batch, tokens, steps, None, device))
            ratios.append(median_step(model, batch, tokens, steps, DriftCallback(prior), device) / plain[-1])
        parameters = sum(value.numel() for value in model.parameters())
        sizes = {"parameters": parameters, "tokens": batch * tokens, "modules": modules, "store": store}
        spread = {"low": min(ratios) - 1, "high": max(ratios) - 1}
        found.append({**sizes, "step": statistics.median(plain), "added": statistics.median(ratios) - 1, **spread})
    return found


def main() -> None:
    """Print the table, and keep the rows where asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="two sizes on the CPU, under two minutes")
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=64, help="per row")
    parser.add_argument("--steps", type=int, default=10, help="per block")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--store", choices=["device", "cpu"], default="device")
    parser.add_argument("--out", type=Path, help="JSON file for the rows")
    given = parser.parse_args()
    sizes = [(given.hidden, given.layers, given.batch, given.tokens, given.steps)]
    if given.quick:
        sizes = [(128, 4, 8, 32, 16), (512, 4, 8, 64, 4)]
    rows = [row for size in sizes for row in measure(*size, given.device, given.store)]
    said = f"{given.device}, {torch.get_num_threads()} threads, torch {torch.__version__}, {platform.machine()}"
    print("| parameters | tokens a step | Δ of | step without, ms | added | over blocks |\n|---|---|---|---|---|---|")
    for row in rows:
        print(
            f"| {row['parameters'] / 1e6:.1f} M | {row['tokens']} | {row['modules']} ({row['store']}) | "
            f"{1e3 * row['step']:.0f} | {100 * row['added']:+.1f} % | "
            f"{100 * row['low']:+.1f} to {100 * row['high']:+.1f} % |"
        )
    print(f"\n{said}")
    if given.out:
        given.out.write_text(json.dumps({"machine": said, "rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
