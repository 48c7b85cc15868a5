"""Question files, batches and greedy answers."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from vlmgraft.data.questions import hold_images
from vlmgraft.errors import DataError, VlmgraftError
from vlmgraft.hf.batches import (
    Question,
    append_answers,
    batches,
    encode,
    generate_batch,
    load_questions,
    planned_lengths,
    prompt_lengths,
)
from vlmgraft.hf.templates import prompt_text

Draw = Callable[[int], Image.Image]
Ask = Callable[..., list[Question]]


def write(path: Path, *rows: object) -> Path:
    path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows))
    return path


def test_a_file_is_read_with_paths_relative_to_it(tmp_path: Path, random_image: Draw) -> None:
    random_image(0).save(tmp_path / "a.png")
    row = {"image": "a.png", "question": "what?", "answer": 3, "choices": ["x", "y"], "category": "c", "extra": 1}
    (found,) = load_questions(write(tmp_path / "q.jsonl", row, ""))
    assert found == Question("what?", (tmp_path / "a.png",), "3", ("x", "y"), "c")
    assert found.prompt == "what?\nA. x\nB. y"


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("{", "line 2: not JSON"),
        ({"image": "a.png"}, 'line 2: needs a "question"'),
        ({"question": "q", "image": "b.png"}, "line 2: image .*b.png: missing"),
        ({"question": "q", "image": "bad.png"}, "line 2: image .*bad.png: cannot be read"),
        ({"question": "q", "image": 3}, "line 2: .*path or a picture"),
        ({"question": "q"}, 'line 2: has no "image"'),
        ({"question": "q", "image": "a.png", "choices": "A"}, "neither a list nor lettered"),
    ],
)
def test_bad_lines_are_named(tmp_path: Path, row: object, message: str, random_image: Draw) -> None:
    random_image(0).save(tmp_path / "a.png")
    (tmp_path / "bad.png").write_bytes(b"not an image")
    path = write(tmp_path / "q.jsonl", {"question": "q", "image": "a.png"}, row)
    with pytest.raises(DataError, match=message):
        load_questions(path, need_images=True)


def test_missing_and_empty_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such question file"):
        load_questions(tmp_path / "none.jsonl")
    with pytest.raises(DataError, match="holds no question"):
        load_questions(write(tmp_path / "q.jsonl", ""))


def test_batches_cover_every_question_once_and_keep_images_apart(random_image: Draw) -> None:
    questions = [Question("a" * (i % 7), (random_image(0),) if i % 3 else ()) for i in range(23)]
    found = batches(questions, 4)
    assert sorted(i for batch in found for i in batch) == list(range(23))
    assert all(len(batch) <= 4 and len({bool(questions[i].images) for i in batch}) == 1 for batch in found)


def test_batches_hold_to_a_number_of_tokens() -> None:
    questions, lengths = [Question("a" * 9)] * 7, [10, 20, 90, 30, 10, 10, 10]
    assert batches(questions, 4, lengths, 60) == [[0, 1], [2], [3, 4], [5, 6]]
    assert batches(questions, 4, lengths) == batches(questions, 4) == [[0, 1, 2, 3], [4, 5, 6]]


def test_without_pixels_a_prompt_is_the_same_and_no_image_is_decoded(
    processor: Any, image_questions: Ask, random_image: Draw, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    random_image(0).resize((90, 60)).save(tmp_path / "a.png")
    (held,) = hold_images([Question("what?", (tmp_path / "a.png",), max_pixels=2000)])
    questions = [*image_questions(3), held]
    whole = encode(processor, questions)
    monkeypatch.setattr(Image.Image, "load", lambda self: pytest.fail("decoded") if self.format else None)
    blank = encode(processor, questions, pixels=False)
    assert blank.keys() == whole.keys() and not blank["pixel_values"].equal(whole["pixel_values"])
    assert all(blank[key].equal(value) for key, value in whole.items() if key != "pixel_values")
    assert prompt_lengths(processor, questions) == whole["attention_mask"].sum(1).tolist()


def test_answers_are_appended_without_padding_between(processor: Any, image_questions: Ask) -> None:
    questions, answers = image_questions(3), [[11, 12, 13], [14], [15, 16]]
    batch = encode(processor, questions)
    full, predicts = append_answers(batch, answers, pad=0)
    assert predicts.sum(1).tolist() == [3, 1, 2]
    for row, answer in enumerate(answers):
        prompt = batch["input_ids"][row][batch["attention_mask"][row].bool()].tolist()
        length = len(prompt) + len(answer)
        assert full["input_ids"][row, :length].tolist() == prompt + answer
        assert full["attention_mask"][row].tolist() == [1] * length + [0] * (full["input_ids"].shape[1] - length)
        targets = full["input_ids"][row].roll(-1)[predicts[row]]
        assert targets.tolist() == answer
    assert full["mm_token_type_ids"].shape == full["input_ids"].shape
    assert int(full["mm_token_type_ids"].sum()) == int(batch["mm_token_type_ids"].sum())


def test_greedy_answers_do_not_depend_on_the_batch(vlm: Any, processor: Any, image_questions: Ask) -> None:
    questions = image_questions(5)
    together, lengths = generate_batch(vlm, processor, questions, 4)
    for question, answer, length in zip(questions, together, lengths, strict=True):
        assert generate_batch(vlm, processor, [question], 4) == ([answer], [length])


def test_greedy_answers_follow_the_plain_forward(llm: Any, processor: Any) -> None:
    question = Question("sum 4 5")
    ((found,), _) = generate_batch(llm, processor.tokenizer, [question], 5)
    ids = encode(processor.tokenizer, [question])["input_ids"]
    for token in found:
        with torch.no_grad():
            assert int(llm(input_ids=ids).logits[0, -1].argmax()) == token
        ids = torch.cat([ids, torch.tensor([[token]])], dim=1)


def test_what_the_model_cannot_read_is_named(llm: Any, processor: Any, image_questions: Ask) -> None:
    with pytest.raises(DataError, match="reads text only"):
        encode(processor.tokenizer, image_questions(1))
    with pytest.raises(DataError, match="the model reads 256"):
        generate_batch(llm, processor.tokenizer, [Question("sum " * 300)], 4)


def test_a_small_model_answers_with_one_thread(
    vlm: Any, processor: Any, image_questions: Ask, threads_seen: list[int]
) -> None:
    generate_batch(vlm, processor, image_questions(2), 4)
    assert set(threads_seen) == {1}


def test_planned_lengths_are_the_true_ones_and_the_processor_sees_every_size_once(
    processor: Any, random_image: Draw, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = [random_image(n).resize(size) for n, size in enumerate([(56, 56), (112, 56), (56, 56), (112, 84)])]
    questions = [Question("what " * n, (image,)) for n, image in enumerate(images, 1)]
    questions += [Question("sum " * 7), Question("both", tuple(images[:2])), Question("more words", tuple(images[:2]))]
    expected = [int(encode(processor, [question])["attention_mask"].sum()) for question in questions]
    seen: list[Question] = []
    real = encode
    monkeypatch.setattr(
        "vlmgraft.hf.batches.encode", lambda given, asked, **more: seen.extend(asked) or real(given, asked, **more)
    )
    assert planned_lengths(processor, questions) == expected and len(set(expected)) > 4
    assert seen == [questions[0], questions[1], questions[3], questions[5]]


def test_a_question_that_the_processor_refuses_is_planned_by_its_text(processor: Any, random_image: Draw) -> None:
    text = len(processor.tokenizer(prompt_text(processor.tokenizer, Question("what is it")))["input_ids"])
    with_image = Question("what is it", (random_image(0),))
    assert planned_lengths(processor.tokenizer, [with_image]) == [text]


def test_what_the_libraries_refuse_is_the_question_s_fault_and_our_mistakes_are_not(
    vlm: Any, processor: Any, image_questions: Ask, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(error: type[Exception]) -> Any:
        def call(*_: Any, **__: Any) -> Any:
            raise error("odd")

        return call

    questions = image_questions(2)
    monkeypatch.setattr(vlm, "generate", broken(ValueError))
    with pytest.raises(DataError, match=r"or one of 1 others: the model cannot answer it \(odd\)"):
        generate_batch(vlm, processor, questions, 4)
    monkeypatch.setattr(vlm, "generate", broken(KeyError))
    with pytest.raises(KeyError):
        generate_batch(vlm, processor, questions, 4)
    monkeypatch.setattr(type(processor), "__call__", broken(IndexError))
    with pytest.raises(DataError, match=r"the processor cannot read it \(odd\)"):
        generate_batch(vlm, processor, questions, 4)
    monkeypatch.setattr(type(processor), "__call__", broken(TypeError))
    with pytest.raises(TypeError):
        generate_batch(vlm, processor, questions, 4)
    monkeypatch.setattr(type(processor), "__call__", broken(MemoryError))
    with pytest.raises(VlmgraftError, match="out of memory while answering 2 questions at once"):
        generate_batch(vlm, processor, questions, 4)
