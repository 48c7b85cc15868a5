"""The lab's tasks: answers recomputed independently, a vocabulary of every word, draws that stay as they are."""

from __future__ import annotations

import json
import zlib
from pathlib import Path

import numpy as np
from hypothesis import given, strategies as st

from experiments.lab import tasks
from vlmgraft.lab import world

SPLITS: tuple[world.Split, ...] = ("train", "calibration", "validation", "test")
TASKS = (*world.PERCEPTION, "sum", *tasks.TEXT_ONLY, *tasks.TRANSFER, *tasks.TRANSFER_TEXT)
PLACES = ("first", "second", "third", "fourth")
seeds = st.integers(0, 2**32 - 1)


def expected(item: world.ExamItem) -> str:
    """The answer from the told question alone: its words between the delimiters, and what is asked."""
    words = item.text_question.split()
    told: list[str] = []
    if "<|vision_start|>" in words:
        end = words.index("<|vision_end|>")
        told, words = words[1:end], words[end + 1 :]
    colours, glyphs = told[0::2], told[1::2]
    if words[:2] == ["what", "is"] and "+" in words:
        return str(int(words[2]) + int(words[4]))
    if words[0] == "copy":
        return " ".join(words[1:])
    if words[:2] == ["what", "colour"]:
        return colours[PLACES.index(words[4])]
    if words[:2] == ["what", "glyph"]:
        return glyphs[PLACES.index(words[4])]
    if words[0] == "read":
        return " ".join(glyphs)
    if words[0] == "list":
        return " ".join(colours)
    if "-" in words:
        return str(int(glyphs[0]) - int(glyphs[1]))
    return str(sum(int(glyph) for glyph in glyphs))


@given(seeds, st.sampled_from(TASKS))
def test_answers_are_right(seed: int, task: str) -> None:
    item = tasks.draw_item(np.random.default_rng(seed), task)
    assert item.answer.rpartition("</think> ")[2] == expected(item)


@given(seeds, st.sampled_from(TASKS))
def test_vocabulary_covers_every_word(seed: int, task: str) -> None:
    item = tasks.draw_item(np.random.default_rng(seed), task)
    known = set(tasks.vocabulary())
    assert set(f"{item.question} {item.text_question} {item.answer} user assistant".split()) <= known


@given(seeds)
def test_other_tasks_are_what_they_are_called(seed: int) -> None:
    drawn = {task: tasks.draw_item(np.random.default_rng(seed), task) for task in (*tasks.TRANSFER, "numbers")}
    shown = {task: [int(glyph) for glyph in item.scene.glyphs] for task, item in drawn.items() if item.scene}
    assert max(shown["small_digits"]) <= 4 and min(shown["large_digits"]) >= 5
    assert len(shown["five_digits"]) == 5 and shown["difference"][0] >= shown["difference"][1]
    assert all(0 <= int(item.answer.split()[-1]) <= tasks.LARGEST_NUMBER for item in drawn.values())
    assert drawn["reworded"].question != drawn["small_digits"].question


def test_the_vocabulary_is_that_of_the_embedded_models(trio: Path) -> None:
    """Token ids are positions: a word more or less, and the carried weights read another language."""
    stored = json.loads((trio / "vlm" / "tokenizer.json").read_text(encoding="utf-8"))["model"]["vocab"]
    assert [word for word, _ in sorted(stored.items(), key=lambda pair: pair[1])] == tasks.vocabulary()


def test_the_tuned_tasks_are_drawn_as_ever() -> None:
    """The embedded trio's exams and calibration questions: other draws would be other figures."""
    items = tasks.draw_items(0, "test", (*world.PERCEPTION, "sum", *tasks.TEXT_ONLY), 20)
    told = "\n".join(f"{item.text_question} {item.answer}" for item in items)
    assert zlib.crc32(told.encode()) == 97702400


def test_vocabulary_has_no_word_twice() -> None:
    words = tasks.vocabulary()
    assert len(words) == len(set(words))
    assert {str(number) for number in range(45 + 9 + 1)} <= set(words), "every sum that can be asked"


def test_questions_of_splits_and_seeds_differ() -> None:
    drawn = {
        (seed, split): tuple(item.text_question for item in tasks.draw_items(seed, split, ("sum", "read"), 20))
        for seed in (0, 1)
        for split in SPLITS
    }
    assert len(set(drawn.values())) == len(drawn)
    again = tasks.draw_items(0, "test", ("sum", "read"), 20)
    assert tuple(item.text_question for item in again) == drawn[0, "test"]
