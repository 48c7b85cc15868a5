"""The callback in a transformers trainer, against the loop written by hand."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import Trainer, TrainingArguments

from vlmgraft.alignment import align
from vlmgraft.checkpoint.index import open_checkpoint
from vlmgraft.errors import NumericalError, RecipeError, VlmgraftError
from vlmgraft.finetuning.callback import DriftCallback
from vlmgraft.finetuning.delta import make_prior
from vlmgraft.finetuning.prior import Prior, PushRule
from vlmgraft.finetuning.push import bind_prior
from vlmgraft.hf.models import load_vlm
from vlmgraft.storage.jsonl import read_rows

RATE = 0.05
Q0 = "model.language_model.layers.0.self_attn.q_proj.weight"


@pytest.fixture(scope="module")
def prior_of(trio: Path) -> Callable[..., Prior]:
    alignment = align(open_checkpoint(trio / "vlm"), open_checkpoint(trio / "donor"), modules=["attention"])

    def make(mode: Any = "adaptive", strength: float = 1.0, schedule: Any = "constant") -> Prior:
        return make_prior(alignment, PushRule(mode, strength, schedule), dtype=torch.float32)

    return make


@pytest.fixture
def rows() -> list[dict[str, Any]]:
    """Eight rows of the same length, so that the mean over tokens is the mean over rows."""
    ids = torch.randint(10, 60, (8, 6), generator=torch.Generator().manual_seed(0)).tolist()
    return [{"input_ids": row, "labels": row, "attention_mask": [1] * 6} for row in ids]


def collate(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    return {key: torch.tensor([row[key] for row in rows]) for key in rows[0]}


def trained(
    trio: Path, folder: Path, rows: Any, callback: DriftCallback | None, **options: Any
) -> tuple[dict[str, torch.Tensor], Any]:
    """Weights after two optimiser steps of plain gradient descent, in the order of the rows."""
    settings = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "max_grad_norm": 0.5} | options
    arguments = TrainingArguments(
        folder,
        optim="sgd",
        learning_rate=RATE,
        lr_scheduler_type="constant",
        train_sampling_strategy="sequential",
        logging_steps=1,
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
        save_strategy="no",
        num_train_epochs=1,
        **settings,
    )
    model = load_vlm(trio / "vlm", torch.float32)
    callbacks = [callback] if callback else []
    trainer = Trainer(model, arguments, collate, train_dataset=rows, callbacks=callbacks)
    trainer.train()
    return {name: value.detach().clone() for name, value in model.named_parameters()}, trainer


def by_hand(trio: Path, rows: Any, prior: Prior, clip: float) -> dict[str, torch.Tensor]:
    """The same two steps, written out: accumulate, push, clip, step."""
    model = load_vlm(trio / "vlm", torch.float32).train()
    bound, optimiser = bind_prior(prior, model), torch.optim.SGD(model.parameters(), RATE)
    for step in range(2):
        for half in range(2):
            start = 4 * step + 2 * half
            (model(**collate(rows[start : start + 2])).loss / 2).backward()
        bound.push(step / 2)
        if clip:
            torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimiser.step()
        optimiser.zero_grad()
    return {name: value.detach() for name, value in model.named_parameters()}


def distance(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    return max(float((one[name] - other[name]).abs().max()) for name in one)


@pytest.mark.parametrize("clip", [0.0, 0.5])
@pytest.mark.parametrize(("mode", "schedule"), [("adaptive", "constant"), ("absolute", "linear")])
def test_the_accumulated_gradient_is_pushed_once_before_clipping(
    trio: Path, tmp_path: Path, rows: Any, prior_of: Any, mode: Any, schedule: Any, clip: float
) -> None:
    prior = prior_of(mode, 1.0, schedule)
    weights, _ = trained(trio, tmp_path, rows, DriftCallback(prior), max_grad_norm=clip)
    expected, plain = by_hand(trio, rows, prior, clip), by_hand(trio, rows, prior_of("absolute", 0.0), clip)
    assert distance(weights, expected) < 2e-6
    assert distance(weights, plain) > 2e-5  # the push is not nothing


def test_hooking_every_backward_is_the_same_without_accumulation_only(
    trio: Path, tmp_path: Path, rows: Any, prior_of: Any
) -> None:
    prior = prior_of("grad_norm")
    once = {"gradient_accumulation_steps": 1}
    step, _ = trained(trio, tmp_path / "a", rows, DriftCallback(prior), **once)
    backward, _ = trained(trio, tmp_path / "b", rows, DriftCallback(prior, when="backward"), **once)
    assert distance(step, backward) < 1e-6
    step, _ = trained(trio, tmp_path / "c", rows, DriftCallback(prior))
    backward, _ = trained(trio, tmp_path / "d", rows, DriftCallback(prior, when="backward"))
    assert distance(step, backward) > 1e-5


def test_gradient_checkpointing_and_bfloat16(trio: Path, tmp_path: Path, rows: Any, prior_of: Any) -> None:
    prior = prior_of()
    expected, _ = trained(trio, tmp_path / "a", rows, DriftCallback(prior))
    again, _ = trained(trio, tmp_path / "b", rows, DriftCallback(prior), gradient_checkpointing=True)
    assert distance(expected, again) < 1e-6
    mixed, trainer = trained(trio, tmp_path / "c", rows, DriftCallback(prior), bf16=True)
    assert distance(expected, mixed) < 5e-3
    assert trainer.state.log_history[0]["drift_push_attention"] > 0


def test_the_log_and_the_hooks(trio: Path, tmp_path: Path, rows: Any, prior_of: Any) -> None:
    callback = DriftCallback(prior_of("grad_norm", 2.0))
    _, trainer = trained(trio, tmp_path, rows, callback)
    logged = list(read_rows(tmp_path / "drift.jsonl"))
    assert len(logged) == 2 * 16 and {row["step"] for row in logged} == {1, 2}
    assert all(row["push"] == pytest.approx(2.0, rel=1e-4) and abs(row["cos"]) <= 1 for row in logged)
    way = [row["moved"] for row in logged if row["tensor"].endswith("0.self_attn.q_proj.weight")]
    assert 0 < way[0] < way[1]
    means = trainer.state.log_history[0]
    assert means["drift_moved_attention"] > 0 and "drift_cos_attention" in means
    assert not any(parameter._post_accumulate_grad_hooks for parameter in trainer.model.parameters())


def test_a_loss_scaler(trio: Path, rows: Any, prior_of: Any) -> None:
    """Scaled gradients, pushed with their scale, make the step of unscaled ones; an overflow is skipped."""
    prior = prior_of("absolute", 0.5)
    results = []
    for scale in (1.0, 256.0):
        model = load_vlm(trio / "vlm", torch.float32).train()
        bound, optimiser = bind_prior(prior, model), torch.optim.SGD(model.parameters(), RATE)
        scaler = torch.amp.GradScaler("cpu", init_scale=scale)
        scaler.scale(model(**collate(rows[:2])).loss).backward()
        bound.push(loss_scale=scaler.get_scale(), overflow=True)
        scaler.step(optimiser)
        results.append({name: value.detach() for name, value in model.named_parameters()})
    assert distance(*results) < 1e-6


class Poison(torch.autograd.Function):
    """The identity with a gradient of NaN."""

    @staticmethod
    def forward(ctx: Any, value: torch.Tensor) -> torch.Tensor:
        return value.clone()

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
        return grad * float("nan")


class Poisoned(Trainer):  # type: ignore[misc]
    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        return Poison.apply(super().compute_loss(*args, **kwargs))


def test_a_gradient_of_nan_ends_the_training_by_name(trio: Path, tmp_path: Path, rows: Any, prior_of: Any) -> None:
    model = load_vlm(trio / "vlm", torch.float32)
    before = {name: value.detach().clone() for name, value in model.named_parameters()}
    arguments = TrainingArguments(tmp_path, report_to=[], use_cpu=True, disable_tqdm=True, max_steps=1)
    callback = DriftCallback(prior_of())
    with pytest.raises(NumericalError, match=r"self_attn.*its gradient is NaN"):
        Poisoned(model, arguments, collate, train_dataset=rows, callbacks=[callback]).train()
    callback.remove()
    assert all(value.equal(before[name]) for name, value in model.named_parameters())
    assert not any(parameter._post_accumulate_grad_hooks for parameter in model.parameters())


@pytest.mark.parametrize(("arguments", "accelerate"), [("zero2.json", "NO"), (None, "DEEPSPEED")])
def test_deepspeed_is_refused_when_training_begins(
    arguments: str | None, accelerate: str, prior_of: Any, tmp_path: Path
) -> None:
    state = SimpleNamespace(distributed_type=f"DistributedType.{accelerate}")
    args = SimpleNamespace(output_dir=tmp_path, deepspeed=arguments, fsdp=None)
    with pytest.raises(RecipeError, match="deepspeed: ZeRO-2"):
        DriftCallback(prior_of()).on_train_begin(
            args, None, None, model=None, optimizer=SimpleNamespace(accelerator_state=state)
        )


def test_what_cannot_be_pushed_is_refused_at_once(trio: Path, tmp_path: Path, rows: Any, prior_of: Any) -> None:
    kwargs = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}}
    with pytest.raises(RecipeError, match="reentrant"):
        trained(trio, tmp_path, rows, DriftCallback(prior_of()), **kwargs)
    with pytest.raises(RecipeError, match=r"prior\.when: 'often'"):
        DriftCallback(prior_of(), when="often")  # type: ignore[arg-type]
    frozen = load_vlm(trio / "vlm", torch.float32).requires_grad_(False)
    frozen.lm_head.requires_grad_(True)
    callback = DriftCallback(prior_of())
    arguments = TrainingArguments(tmp_path, report_to=[], use_cpu=True, disable_tqdm=True, max_steps=1)
    with pytest.raises(VlmgraftError, match="none of the 16 tensors of the prior is trained"):
        Trainer(frozen, arguments, collate, train_dataset=rows, callbacks=[callback]).train()
