"""Settings that trade memory or change what counts: checkpointed layers, bfloat16, all tokens, packing, big heads."""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

import pytest
import torch

from vlmgraft.distillation import targets, trainer
from vlmgraft.distillation.distill import Distiller
from vlmgraft.errors import DataError, VlmgraftError
from vlmgraft.hf.modules import text_model


def small(distiller: Distiller, **options: Any) -> Distiller:
    given = {"max_new_tokens": 6, "batch_size": 12, **options}
    model = given.pop("model", distiller.model)
    return Distiller(model, distiller.processor, distiller.factors, distiller.questions, distiller.held_out, **given)


def as_float32(inputs: dict[str, Any]) -> dict[str, Any]:
    return {**inputs, "pixel_values": inputs["pixel_values"].float()}


def all_logits(gates: Any) -> torch.Tensor:
    return torch.cat([logits.flatten() for logits in gates.logits.values()])


def test_checkpointed_layers_give_the_same_gates_and_are_put_back(distiller: Distiller) -> None:
    calls: list[int] = []
    layer = text_model(distiller.model).layers[0]
    handle = layer.mlp.register_forward_pre_hook(lambda *args: calls.append(1))
    plain = distiller.learn(steps=4, inject_weight=0.1)
    once, calls[:] = len(calls), []
    kept = distiller.learn(steps=4, inject_weight=0.1, gradient_checkpointing=True)
    handle.remove()
    assert len(calls) == 2 * once, "every layer is run again in the backward pass"
    assert torch.allclose(all_logits(kept), all_logits(plain), atol=1e-6)
    assert all("forward" not in vars(layer) for layer in text_model(distiller.model).layers)
    assert kept.settings == plain.settings


def test_bfloat16_models_learn_float32_gates(distiller: Distiller, monkeypatch: pytest.MonkeyPatch) -> None:
    """Compute in bfloat16; logits, gradients and Adam's moments in float32; the gradient points the same way."""
    seen: list[torch.Tensor] = []
    ordinary = trainer.GateTrainer._step

    def step(self: Any, *args: Any) -> Any:
        row = ordinary(self, *args)
        moments = self.optimizer.state[self.vector.logits]
        assert self.vector.logits.dtype == moments["exp_avg"].dtype == torch.float32
        seen.append(self.vector.logits.grad.clone())
        return row

    monkeypatch.setattr(trainer.GateTrainer, "_step", step)
    low = small(distiller, model=copy.deepcopy(distiller.model).bfloat16())
    gates = low.learn(steps=1, inject_weight=0.0)
    assert all(logits.dtype == torch.float32 for logits in gates.logits.values())
    same = Distiller(distiller.model, distiller.processor, distiller.factors, distiller.questions, max_new_tokens=6)
    same.targets = targets.Targets(
        tuple(
            targets.TargetBatch(b.ids, partial(as_float32, b.inputs), None, b.predicts, b.target)
            for b in low.targets.batches
        ),
        low.targets.questions,
        low.targets.answers,
    )
    same.learn(steps=1, inject_weight=0.0)
    assert seen[0].dtype == torch.float32
    assert torch.cosine_similarity(seen[0], seen[1], dim=0) > 0.95


def test_all_text_tokens_count_but_images_and_padding_do_not(distiller: Distiller) -> None:
    everywhere = small(distiller, tokens="all")
    image = distiller.model.config.image_token_id
    for batch, answers in zip(everywhere.targets.batches, distiller.targets.batches, strict=True):
        ids, keep = batch.inputs["input_ids"], batch.inputs["attention_mask"].bool()
        following = ids.roll(-1, 1)
        assert bool((answers.predicts <= batch.predicts).all()) and batch.predicts.sum() > answers.predicts.sum()
        assert not bool((following[batch.predicts] == image).any()) and not bool(batch.predicts[:, -1].any())
        expected = sum(int((row[mask][1:] != image).sum()) for row, mask in zip(ids, keep, strict=True))
        assert int(batch.predicts.sum()) == expected == len(batch.target.log_p)
    assert everywhere.keep_kl(None, everywhere.targets) == pytest.approx(0, abs=1e-6)
    gates = everywhere.learn(steps=2, inject_weight=0.1)
    assert gates.log[0]["kl"] > 0
    with pytest.raises(DataError, match="neither"):
        small(distiller, tokens="prompt")


@pytest.mark.parametrize("vocabulary", [10, 4096])
def test_logits_in_pieces_give_the_same_targets_and_gates(
    distiller: Distiller, vocabulary: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(targets, "FULL_VOCABULARY", vocabulary)  # likeliest tokens and a rest, or all
    whole = small(distiller)
    monkeypatch.setattr(targets, "HEAD_ROWS", 7)
    pieces = small(distiller)
    for one, other in zip(whole.targets.batches, pieces.targets.batches, strict=True):
        assert torch.allclose(one.target.log_p, other.target.log_p, atol=1e-5)
        assert (one.target.ids is None) == (other.target.ids is None) == (vocabulary == 4096)
    gates = [each.learn(steps=3, inject_weight=0.1) for each in (whole, pieces)]
    assert torch.allclose(*map(all_logits, gates), atol=1e-4)


def test_pixels_are_not_kept_where_the_text_models_inputs_are(distiller: Distiller) -> None:
    """Read again they are the same; a batch whose replay is not exact keeps what it needs at every step."""
    batch = distiller.targets.batches[0]
    first, again = batch.inputs, batch.inputs
    assert first["pixel_values"] is not again["pixel_values"]
    assert torch.equal(first["pixel_values"], again["pixel_values"]) and torch.equal(first["input_ids"], batch.ids)
    assert batch.captured is not None and "pixel_values" not in batch.captured


@pytest.mark.parametrize("where", ["answers", "teacher", "training"])
def test_out_of_memory_says_what_to_lower(distiller: Distiller, where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: Any, **kwargs: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    if where == "training":
        monkeypatch.setattr(targets.TargetBatch, "kl", full)
        with pytest.raises(
            VlmgraftError, match=r"training gates: lower .*batch_size .*gradient_checkpointing.*2.00 GiB"
        ):
            distiller.learn(steps=1)
        assert all(not layer._forward_pre_hooks for layer in text_model(distiller.model).layers)
        return
    if where == "answers":
        monkeypatch.setattr(type(distiller.model), "generate", full)
    else:
        monkeypatch.setattr(targets.Distribution, "of", full)
    with pytest.raises(VlmgraftError, match="lower batch_size or max_new_tokens"):
        small(distiller)
