"""The engines: transformers on the embedded VLM, and vLLM by a small stand-in for its module.

vLLM itself is not installed where these tests run.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from vlmgraft.errors import InputError
from vlmgraft.evaluation.ask import ask
from vlmgraft.evaluation.engine import Sampling, TransformersEngine, VllmEngine
from vlmgraft.evaluation.items import Item, Suite
from vlmgraft.hf.batches import Question, generate_batch
from vlmgraft.hf.models import load_processor, load_vlm
from vlmgraft.lab import world
from vlmgraft.lab.exam import Exam, draw_exam


@pytest.fixture(scope="module")
def vlm(trio: Path) -> Any:
    return load_vlm(trio / "vlm", torch.float32)


@pytest.fixture(scope="module")
def processor(trio: Path) -> Any:
    return load_processor(trio / "vlm")


@pytest.fixture(scope="module")
def exam() -> Exam:
    return draw_exam(3, "test", {"sum": 6, **dict.fromkeys(world.PERCEPTION, 3)})


def test_the_engine_says_what_generate_says(vlm: Any, processor: Any, exam: Exam) -> None:
    engine = TransformersEngine(vlm, processor, Sampling(28))
    found = engine.answer(exam.questions, 0)
    rows, _ = generate_batch(vlm, processor, exam.questions, 28)
    assert [answer.text for answer in found] == [processor.decode(row, skip_special_tokens=True) for row in rows]
    assert not any(answer.cut for answer in found)
    sums = [answer for answer, item in zip(found, exam.items, strict=True) if item.task == "sum"]
    assert all(answer.tokens == 21 and "<|image_pad|>" in answer.prompt for answer in sums)
    assert all(answer.prompt_tokens == 23 for answer in sums)


def test_an_answer_that_meets_the_limit_is_cut(vlm: Any, processor: Any, exam: Exam) -> None:
    (found,) = TransformersEngine(vlm, processor, Sampling(7)).answer(exam.questions[:1], 0)
    assert found.cut and found.tokens == 7 and "</think>" not in found.text
    record = ask(TransformersEngine(vlm, processor, Sampling(7)), exam.suite, batch_size=8)[0]
    assert (record.cut, record.found, record.score) == (True, False, 0.0)


def test_batched_and_one_by_one_agree(vlm: Any, processor: Any, exam: Exam) -> None:
    engine = TransformersEngine(vlm, processor, Sampling(28))
    assert ask(engine, exam.suite, batch_size=16) == ask(engine, exam.suite, batch_size=1)


def test_marks_are_the_records(vlm: Any, processor: Any, exam: Exam) -> None:
    marks = exam.mark(vlm, processor)
    records = ask(TransformersEngine(vlm, processor, Sampling(28)), exam.suite, batch_size=256)
    for task, right in marks.right.items():
        assert right.tolist() == [record.score == 1 for record in records if record.task == task]
    assert marks.outputs == tuple(record.output for record in records)


def test_sampled_answers_depend_on_the_seed_alone(vlm: Any, processor: Any, exam: Exam) -> None:
    engine = TransformersEngine(vlm, processor, Sampling(12, temperature=3.0))
    drawn = [[answer.text for answer in engine.answer(exam.questions[:4], seed)] for seed in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2]


def test_a_text_question_and_a_picture_that_the_processor_refuses(vlm: Any, processor: Any) -> None:
    from PIL import Image

    thin = Image.new("RGB", (1, 4000))
    items = (Item("thin", "read all glyphs", (thin,), ("1",)), Item("text", "copy red", answers=("red",)))
    records = ask(TransformersEngine(vlm, processor, Sampling(8)), Suite("s", items, max_new_tokens=8))
    assert records[0].state == "failed" and "aspect ratio" in records[0].fault and records[0].score == 0
    assert records[1].state == "scored"


@dataclass
class _Said:
    text: str
    token_ids: list[int]
    finish_reason: str


@dataclass
class _Result:
    outputs: list[_Said]
    prompt_token_ids: list[int]


class _LLM:
    made: dict[str, Any] = {}  # noqa: RUF012
    asked: list[Any] = []  # noqa: RUF012

    def __init__(self, **options: Any) -> None:
        type(self).made = options

    def generate(self, asked: list[Any], params: Any, use_tqdm: bool) -> list[_Result]:
        type(self).asked = [asked, params]
        long = _Said(" 17 and on", [1] * params["max_tokens"], "length")
        return [
            _Result([long if "sum" in each["prompt"] else _Said("red", [5, 6], "stop")], [1, 2, 3]) for each in asked
        ]


def test_vllm_gives_the_same_bookkeeping(monkeypatch: pytest.MonkeyPatch, processor: Any, exam: Exam) -> None:
    module = ModuleType("vllm")
    module.LLM, module.SamplingParams = _LLM, dict  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "vllm", module)
    engine = VllmEngine("folder", processor, Sampling(9, temperature=0.5, top_p=0.9), seed=4)
    assert _LLM.made == {"model": "folder", "seed": 4}
    found = engine.answer([*exam.questions[:1], Question("copy red")], seed=11)
    assert [(answer.text, answer.tokens, answer.cut, answer.prompt_tokens) for answer in found] == [
        ("17 and on", 9, True, 3),
        ("red", 2, False, 3),
    ]
    prompts, params = _LLM.asked
    assert params == {"max_tokens": 9, "temperature": 0.5, "top_p": 0.9, "seed": 11}
    assert len(prompts[0]["multi_modal_data"]["image"]) == 1 and "multi_modal_data" not in prompts[1]
    assert prompts[1]["prompt"] == found[1].prompt and "copy red" in found[1].prompt
    assert len(ask(engine, exam.suite)) == len(exam.items)


@pytest.mark.parametrize("error", [ValueError, RuntimeError, IndexError])
def test_what_vllm_refuses_is_a_failed_answer_and_our_mistakes_are_not(
    error: type[Exception], monkeypatch: pytest.MonkeyPatch, processor: Any
) -> None:
    def broken(*_: Any, **__: Any) -> None:
        raise error("too long")

    module = ModuleType("vllm")
    module.LLM, module.SamplingParams = _LLM, dict  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "vllm", module)
    engine = VllmEngine("folder", processor, Sampling(9))
    with monkeypatch.context() as patch:
        patch.setattr(_LLM, "generate", broken)
        (record,) = ask(engine, Suite("s", (Item("a", "copy red", answers=("red",)),)))
        assert (record.state, record.score, record.fault) == ("failed", 0.0, "too long")
    monkeypatch.setattr("vlmgraft.evaluation.engine.prompt_text", broken)
    with pytest.raises(error, match="too long"):
        engine.answer([Question("copy red")], 0)


def test_without_vllm_it_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch, processor: Any) -> None:
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(InputError, match=r"pip install 'vlmgraft\[vllm\]'"):
        VllmEngine("folder", processor, Sampling())


def test_lengths_are_those_of_the_answers_and_none_with_a_broken_template(
    vlm: Any, processor: Any, exam: Exam, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = TransformersEngine(vlm, processor, Sampling(2))
    lengths = engine.lengths(exam.questions)
    assert lengths == [answer.prompt_tokens for answer in engine.answer(exam.questions, 0)] and len(set(lengths)) > 1
    monkeypatch.setattr(type(processor), "apply_chat_template", lambda *_, **__: 1 / 0)
    assert engine.lengths(exam.questions) == []
