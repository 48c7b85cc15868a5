"""What a teacher is asked and what becomes of its answers: batches, placeholders, and answers of its own file."""

from __future__ import annotations

import base64
import copy
import io
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from tests.chat_server import chat_server, said
from vlmgraft.data.endpoint import Endpoint
from vlmgraft.distillation import teacher
from vlmgraft.distillation.distill import Distiller
from vlmgraft.distillation.teacher import build_targets, pack, placeholders
from vlmgraft.errors import DataError
from vlmgraft.hf.batches import Question, generate_batch
from vlmgraft.hf.modules import tokenizer_of


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
    with pytest.raises(DataError, match="neither"):
        build_targets(side, side, distiller.questions, tokens="some")  # type: ignore[arg-type]
    with pytest.raises(DataError, match="at least one"):
        build_targets(side, side, [])


def served(distiller: Distiller, *, ids: bool) -> Any:
    """What a server of the distiller's model replies, with or without token ids."""
    model, processor = copy.deepcopy(distiller.model), distiller.processor
    tokenizer = tokenizer_of(processor)

    def reply(body: dict[str, Any]) -> dict[str, Any]:
        parts, images = body["messages"][0]["content"], []
        for part in parts if isinstance(parts, list) else []:
            if part["type"] == "image_url":
                images.append(Image.open(io.BytesIO(base64.b64decode(part["image_url"]["url"].partition(",")[2]))))
        question = Question(parts if isinstance(parts, str) else parts[-1]["text"], tuple(images))
        (tokens,), (prompt,) = generate_batch(model, processor, [question], body["max_tokens"])
        cut = tokens[-1] != tokenizer.eos_token_id
        text = tokenizer.decode(tokens, skip_special_tokens=True)
        return said(text, tokens=tokens if ids else None, cut=cut, prompt=prompt)

    return reply


@pytest.mark.parametrize("ids", [True, False])
def test_a_server_of_the_model_answers_as_the_model_does(distiller: Distiller, ids: bool, tmp_path: Path) -> None:
    side, options = (distiller.model, distiller.processor), {"max_new_tokens": 6, "batch_size": 12}
    with chat_server(served(distiller, ids=ids)) as url:
        endpoint = Endpoint(url)
        found = build_targets(side, side, distiller.questions, endpoint=endpoint, cache=tmp_path, **options)
    assert found.answers == distiller.targets.answers
    pairs = zip(found.batches, distiller.targets.batches, strict=True)
    assert all(torch.allclose(one.target.log_p, other.target.log_p, atol=1e-5) for one, other in pairs)
    again = build_targets(side, side, distiller.questions, endpoint=endpoint, cache=tmp_path, **options)
    assert again.answers == found.answers, "kept: the server is gone"


@pytest.mark.parametrize("tokens", ["answer", "all"])
def test_another_models_answers_are_refused_and_forgotten(distiller: Distiller, tokens: Any, tmp_path: Path) -> None:
    """So that the right server is asked when the command is run again, at the same address even."""
    side, options = (distiller.model, distiller.processor), {"max_new_tokens": 6, "batch_size": 12, "cache": tmp_path}
    right = served(distiller, ids=True)
    shift = [1]

    def reply(body: dict[str, Any]) -> dict[str, Any]:
        found = right(body)
        found["choices"][0]["token_ids"] = [token + shift[0] for token in found["choices"][0]["token_ids"]]
        return found

    with chat_server(reply) as url:
        with pytest.raises(DataError, match="serve the same"):
            build_targets(side, side, distiller.questions, endpoint=Endpoint(url), tokens=tokens, **options)
        shift[0] = 0
        found = build_targets(side, side, distiller.questions, endpoint=Endpoint(url), tokens=tokens, **options)
    assert found.answers == distiller.targets.answers
    with chat_server(lambda body: said("", tokens=[10**6])) as url, pytest.raises(DataError, match="the model has not"):
        build_targets(side, side, distiller.questions, endpoint=Endpoint(url))


def test_one_strange_answer_among_many_is_found(distiller: Distiller, monkeypatch: pytest.MonkeyPatch) -> None:
    """Half of a batch's tokens would be the model's own."""
    monkeypatch.setattr(teacher, "LONG_ENOUGH", 4)
    right, calls = served(distiller, ids=True), [0]

    def reply(body: dict[str, Any]) -> dict[str, Any]:
        calls[0] += 1
        return said("", tokens=[9] * 6, cut=True) if calls[0] == 5 else right(body)

    side = distiller.model, distiller.processor
    with chat_server(reply) as url, pytest.raises(DataError, match="an answer's tokens"):
        build_targets(side, side, distiller.questions, max_new_tokens=6, batch_size=12, endpoint=Endpoint(url))


def test_an_answer_ends_before_an_images_placeholder(vlm: Any) -> None:
    assert placeholders(vlm) == {vlm.config.image_token_id, vlm.config.video_token_id}
    assert teacher.before_placeholders({7, 6}, [1, 2, 7, 3]) == [1, 2] and teacher.before_placeholders({7}, [1, 2]) == [
        1,
        2,
    ]
