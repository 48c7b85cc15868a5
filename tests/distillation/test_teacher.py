"""What a teacher is asked and what becomes of its answers: batches, placeholders, and answers of its own file."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from vlmgraft.distillation import teacher
from vlmgraft.distillation.distill import Distiller
from vlmgraft.distillation.teacher import build_targets, pack
from vlmgraft.errors import DataError
from vlmgraft.hf.batches import Question


def test_batches_by_length_pad_least_and_cover_everything() -> None:
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(5, 400, (40,), generator=generator).tolist()
    questions = [Question("q")] * 40

    def padding(packing: Any) -> int:
        groups = pack(questions, lengths, 8, packing, 0)
        assert sorted(index for group in groups for index in group) == list(range(40))
        return sum(max(lengths[i] for i in group) * len(group) for group in groups) - sum(lengths)

    assert padding("length") < 0.3 * padding("shuffle")
    with pytest.raises(DataError, match="neither"):
        pack(questions, lengths, 8, "wide", 0)  # type: ignore[arg-type]


@pytest.mark.parametrize("packing", ["length", "shuffle"])
def test_batches_hold_to_a_number_of_tokens_and_what_is_longer_is_alone(packing: Any) -> None:
    lengths = [10, 2000, 30, 400, 50, 60, 7, 80, 9, 90]
    groups = pack([Question("q")] * 10, lengths, 4, packing, 0, batch_tokens=240)
    assert sorted(index for group in groups for index in group) == list(range(10))
    assert {len(group) for group in groups if max(lengths[i] for i in group) > 240} == {1}
    assert all(max(lengths[i] for i in group) * len(group) <= 240 or len(group) == 1 for group in groups)
    if packing == "length":
        assert [[lengths[i] for i in group] for group in groups] == [[7, 9, 10, 30], [50, 60, 80], [90], [400], [2000]]


def test_questions_without_answers_are_refused(vlm: Any, processor: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(teacher, "generate_batch", lambda *args: ([[vlm.generation_config.eos_token_id], []], [3, 3]))
    with pytest.raises(DataError, match="empty for 2 of 2 questions, first 'sum'"):
        teacher.build_targets((vlm, processor), (vlm, processor), [Question("sum"), Question("colour 1")])
    with pytest.raises(DataError, match="no questions"):
        teacher.build_targets((vlm, processor), (vlm, processor), [])


def test_images_and_plain_text_do_not_share_a_batch() -> None:
    questions = [Question("q", images=(torch,) * (index % 2)) for index in range(9)]  # type: ignore[arg-type]
    groups = pack(questions, [10] * 9, 4, "length", 0)
    assert [sorted(index % 2 for index in group) for group in groups] == [[1] * 4, [0] * 4, [0]]


def test_targets_are_the_teachers_own_distributions_on_its_greedy_answers(distiller: Distiller) -> None:
    """Twin: the ordinary forward pass over prompt and answer, whose likeliest token is the answer's at every place."""
    batch = distiller.targets.batches[0]
    logits = distiller.model(**batch.inputs, use_cache=False).logits
    following = batch.inputs["input_ids"].roll(-1, 1)
    assert torch.allclose(batch.target.log_p, logits[batch.predicts].log_softmax(-1), atol=1e-4)
    assert torch.equal(batch.target.log_p.argmax(-1), following[batch.predicts])


def test_answers_in_other_batches_are_the_same(distiller: Distiller) -> None:
    side = distiller.model, distiller.processor
    apart = build_targets(side, side, distiller.questions, max_new_tokens=6, batch_size=12, answer_batch_size=5)
    assert apart.answers == distiller.targets.answers and len(apart.batches) == len(distiller.targets.batches)
    tokens = distiller.targets.batches[0].tokens() // len(distiller.targets.batches[0].ids)
    few = build_targets(
        side, side, distiller.questions, max_new_tokens=6, batch_size=12, answer_batch_tokens=3 * tokens
    )
    assert few.answers == distiller.targets.answers
    with pytest.raises(DataError, match="neither"):
        build_targets(side, side, distiller.questions, tokens="some")  # type: ignore[arg-type]
    with pytest.raises(DataError, match="at least one"):
        build_targets(side, side, [])
