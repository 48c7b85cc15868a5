"""Tuning a SmolLM2 on rows of (prompt, answer): batches, the loss, an optimiser with float32 masters that resumes, and
generation. Only the seven projections of the decoder layers are trained."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
IMAGE_TOKEN = "<file_sep>"
"""An existing token that text never holds: no embedding is added."""
BATCH = 16
Report = Callable[[str], None]
Row = tuple[list[int], list[int]]
"""Token ids of a prompt and of its answer, the end token included."""


def prompt_of(question: str) -> str:
    """The chat template of base, donor and VLM, without a system prompt."""
    return f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n"


def row_of(tokenizer: Any, question: str, answer: str) -> Row:
    """One training row."""
    return tokenizer(prompt_of(question)).input_ids, [*tokenizer(answer).input_ids, tokenizer.eos_token_id]


def collate(rows: Sequence[Row], pad: int) -> tuple[Tensor, Tensor]:
    """Ids and labels, int64 `[batch, length]`, right-padded to a multiple of 32; labels are −100 outside answers."""
    length = -(-max(len(prompt) + len(answer) for prompt, answer in rows) // 32) * 32
    ids, labels = torch.full((len(rows), length), pad), torch.full((len(rows), length), -100)
    for at, (prompt, answer) in enumerate(rows):
        end = len(prompt) + len(answer)
        ids[at, :end] = torch.tensor(prompt + answer)
        labels[at, len(prompt) : end] = torch.tensor(answer)
    return ids, labels


def answer_loss(decoder: Any, embeddings: Tensor, inputs: Tensor, labels: Tensor) -> Tensor:
    """Mean cross-entropy of the answers' tokens; logits are made at those positions only."""
    hidden = decoder(inputs_embeds=inputs).last_hidden_state[:, :-1]
    kept = labels[:, 1:] != -100
    chosen, targets = hidden[kept], labels[:, 1:][kept]
    rest = -len(targets) % 128  # few shapes: oneDNN prepares every new one anew
    logits = F.linear(F.pad(chosen, (0, 0, 0, rest)), embeddings).float()
    return F.cross_entropy(logits, F.pad(targets, (0, rest), value=-100))


def with_noise(embeds: Tensor, rms: float, where: Tensor, generator: torch.Generator) -> Tensor:
    """Gaussian noise of `rms` on the embeddings at `where`, bool `[batch, length]`: prompts read through a tower are
    never exact word embeddings."""
    noise = torch.randn(embeds.shape, generator=generator).to(embeds.device)
    return (embeds.float() + rms * where[..., None] * noise).to(embeds.dtype)


def trainable_projections(model: nn.Module) -> list[nn.Parameter]:
    """Freeze everything but the projections of the text model's layers, and give these."""
    chosen = []
    for name, parameter in model.named_parameters():
        trained = "vision" not in name and any(f".{projection}." in name for projection in PROJECTIONS)
        parameter.requires_grad_(trained)
        if trained:
            chosen.append(parameter)
    return chosen


@dataclass(frozen=True)
class Schedule:
    """AdamW: cosine to 0 after a warm-up. every: steps between checkpoints."""

    steps: int
    learning_rate: float
    warmup: int = 10
    every: int = 20

    def rate(self, step: int) -> float:
        """The learning rate of a step, counted from 0."""
        decay = 0.5 * (1 + math.cos(math.pi * step / self.steps))
        return self.learning_rate * min(1.0, (step + 1) / self.warmup) * decay


def tune(
    parameters: Sequence[nn.Parameter],
    loss_of: Callable[[int], Tensor],
    schedule: Schedule,
    checkpoint: Path,
    report: Report = print,
) -> None:
    """Train in place; `loss_of(step)` must depend on nothing but the step and the weights, so that a run goes on from
    `checkpoint` as if it had never stopped. The file is removed by `forget` once the result is saved."""
    masters = [nn.Parameter(parameter.detach().float().clone()) for parameter in parameters]
    optimiser = torch.optim.AdamW(masters, lr=schedule.learning_rate, betas=(0.9, 0.98), weight_decay=0.0, fused=True)
    start = _restore(checkpoint, masters, optimiser)
    if start:
        _write_back(masters, parameters)
        report(f"goes on from step {start}")
    began = time.monotonic()
    for step in range(start, schedule.steps):
        optimiser.param_groups[0]["lr"] = schedule.rate(step)
        loss = loss_of(step)
        loss.backward()
        for master, parameter in zip(masters, parameters, strict=True):
            master.grad = None if parameter.grad is None else parameter.grad.float()
            parameter.grad = None
        norm = nn.utils.clip_grad_norm_(masters, 1.0)
        optimiser.step()
        _write_back(masters, parameters)
        if step % 5 == 0 or step + 1 == schedule.steps:
            seconds = time.monotonic() - began
            report(f"step {step}: loss {loss.item():.4f}, gradient {norm.item():.2f}, {seconds:.0f} s")
        if (step + 1) % schedule.every == 0 and step + 1 < schedule.steps:
            _save(checkpoint, step + 1, masters, optimiser)


@torch.no_grad()
def _write_back(masters: Iterable[Tensor], parameters: Iterable[Tensor]) -> None:
    for master, parameter in zip(masters, parameters, strict=True):
        parameter.copy_(master)


def _save(path: Path, step: int, masters: Sequence[Tensor], optimiser: torch.optim.Optimizer) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    state = {"step": step, "masters": [master.data for master in masters], "optimiser": optimiser.state_dict()}
    torch.save(state, path.with_suffix(".part"))
    path.with_suffix(".part").replace(path)


def _restore(path: Path, masters: Sequence[nn.Parameter], optimiser: torch.optim.Optimizer) -> int:
    if not path.is_file():
        return 0
    state = torch.load(path, weights_only=True)
    for master, value in zip(masters, state["masters"], strict=True):
        master.data.copy_(value)
    optimiser.load_state_dict(state["optimiser"])
    return int(state["step"])


@torch.no_grad()
def generate(
    model: Any, tokenizer: Any, questions: Sequence[str], tokens: int = 48, *, temperature: float = 0.0, batch: int = 64
) -> list[str]:
    """Answers of a text model, batched by length; greedy at temperature 0, else sampled within the top 0.9."""
    outputs = [""] * len(questions)
    prompts = [prompt_of(question) for question in questions]
    order = sorted(range(len(prompts)), key=lambda at: len(prompts[at]))
    how = {"do_sample": True, "temperature": temperature, "top_p": 0.9} if temperature else {"do_sample": False}
    tokenizer.padding_side = "left"
    for start in range(0, len(order), batch):
        chosen = order[start : start + batch]
        inputs = tokenizer([prompts[at] for at in chosen], return_tensors="pt", padding=True).to(model.device)
        written = model.generate(**inputs, max_new_tokens=tokens, **how)[:, inputs.input_ids.shape[1] :]
        for at, text in zip(chosen, tokenizer.batch_decode(written, skip_special_tokens=True), strict=True):
            outputs[at] = text
    return outputs
