"""What analyses ask: registered sources and files, scored as an evaluation scores them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from vlmgraft.analysis.eval_data import EvalData, SuiteEvaluator, as_questions
from vlmgraft.errors import DataError
from vlmgraft.evaluation.readers import load_suite
from vlmgraft.hf.models import load_processor, load_vlm
from vlmgraft.lab.exam import draw_exam, save_questions


def test_the_lab_is_asked_on_its_validation_split(processor: Any) -> None:
    evaluator = EvalData(samples=16).evaluator(processor)
    assert evaluator.reasoning == ["reasoning: sum"] and len(evaluator.perception) == 4
    assert evaluator.suite.items == load_suite("lab", split="validation", limit=16).items
    assert evaluator.batch_size == 256 and evaluator.sampling.max_new_tokens == 28
    assert EvalData(samples=16, batch_size=3).evaluator(processor).batch_size == 3


def test_prompts_are_of_the_calibration_split_or_the_first_questions(processor: Any, tmp_path: Path) -> None:
    data = EvalData(samples=8)
    prompts = data.prompts(data.evaluator(processor).suite, 16)
    expected = as_questions(load_suite("lab", split="calibration", limit=16), 16)
    assert [prompt.question for prompt in prompts] == [prompt.question for prompt in expected]
    assert len(prompts) == 16 and all(prompt.images for prompt in prompts)
    assert prompts[0].images[0].tobytes() == expected[0].images[0].tobytes()  # type: ignore[union-attr]


def test_without_a_split_for_it_no_kl_is_measured(tmp_path: Path) -> None:
    file = save_questions(draw_exam(0, "validation", {"colour": 2}), tmp_path / "q.jsonl")
    assert EvalData((str(file),)).kl_prompts() is None


def test_one_kind_alone_is_refused(processor: Any) -> None:
    suite = draw_exam(0, "validation", {"colour": 2}).suite
    with pytest.raises(DataError, match="both are needed"):
        SuiteEvaluator(suite, processor)


def test_a_question_and_its_rotations_count_once(trio: Path) -> None:
    """As an evaluation counts them: right only when all are right."""
    suite = draw_exam(0, "validation", {"sum": 2, "colour": 2}).suite
    exam = SuiteEvaluator(suite, load_processor(trio / "vlm"))
    single = exam(load_vlm(trio / "vlm", "float32"))
    assert [len(right) for right in single.values()] == [2, 2]
    turned = [replace(item, group=item.task, pairing="all_right") for item in suite.items]
    grouped = SuiteEvaluator(replace(suite, items=tuple(turned)), load_processor(trio / "vlm"))
    found = grouped(load_vlm(trio / "vlm", "float32"))
    assert found == {task: [all(right)] for task, right in single.items()}
