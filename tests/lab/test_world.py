"""The world: answers recomputed independently, splits that share no hand, a vocabulary that covers every word."""

from __future__ import annotations

import json
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vlmgraft.lab import world

SPLITS: tuple[world.Split, ...] = ("train", "calibration", "validation", "test")
TASKS: tuple[world.Task, ...] = (
    *world.PERCEPTION, "sum", *world.TEXT_ONLY, *world.TRANSFER, *world.TRANSFER_TEXT,
)  # fmt: skip
PLACES = ("first", "second", "third", "fourth")
seeds = st.integers(0, 2**32 - 1)


def expected(item: world.Item) -> str:
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
def test_answers_are_right(seed: int, task: world.Task) -> None:
    item = world.draw_item(np.random.default_rng(seed), task)
    assert item.answer.rpartition("</think> ")[2] == expected(item)


@given(seeds)
def test_every_step_of_a_chain_of_thought_is_true(seed: int) -> None:
    item = world.draw_item(np.random.default_rng(seed), "sum")
    assert item.scene is not None and all(glyph in world.DIGITS for glyph in item.scene.glyphs)
    thought, _, final = item.answer.removeprefix("<think> ").partition(" </think> ")
    steps = [step.split() for step in thought.split(" ; ")]
    assert [int(step[0]) for step in steps] == [int(item.scene.glyphs[0]), *(int(step[4]) for step in steps[:-1])]
    assert tuple(step[2] for step in steps) == item.scene.glyphs[1:]
    assert all(int(step[0]) + int(step[2]) == int(step[4]) and step[1] + step[3] == "+=" for step in steps)
    assert final == steps[-1][4]


@given(seeds, st.sampled_from(TASKS))
def test_vocabulary_covers_every_word(seed: int, task: world.Task) -> None:
    item = world.draw_item(np.random.default_rng(seed), task)
    known = set(world.vocabulary())
    assert set(f"{item.question} {item.text_question} {item.answer} user assistant".split()) <= known


@given(seeds)
def test_other_tasks_are_what_they_are_called(seed: int) -> None:
    drawn = {task: world.draw_item(np.random.default_rng(seed), task) for task in (*world.TRANSFER, "numbers")}
    shown = {task: [int(glyph) for glyph in item.scene.glyphs] for task, item in drawn.items() if item.scene}
    assert max(shown["small_digits"]) <= 4 and min(shown["large_digits"]) >= 5
    assert len(shown["five_digits"]) == 5 and shown["difference"][0] >= shown["difference"][1]
    assert all(0 <= int(item.answer.split()[-1]) <= world.LARGEST_NUMBER for item in drawn.values())
    assert drawn["reworded"].question != drawn["small_digits"].question


def test_the_vocabulary_is_that_of_the_embedded_models(trio: Path) -> None:
    """Token ids are positions: a word more or less, and the carried weights read another language."""
    stored = json.loads((trio / "vlm" / "tokenizer.json").read_text(encoding="utf-8"))["model"]["vocab"]
    assert [word for word, _ in sorted(stored.items(), key=lambda pair: pair[1])] == world.vocabulary()


def test_the_tuned_tasks_are_drawn_as_ever() -> None:
    """The embedded trio's exams and calibration questions: other draws would be other figures."""
    items = world.draw_items(0, "test", (*world.PERCEPTION, "sum", *world.TEXT_ONLY), 20)
    told = "\n".join(f"{item.text_question} {item.answer}" for item in items)
    assert zlib.crc32(told.encode()) == 97702400


def test_vocabulary_has_no_word_twice() -> None:
    words = world.vocabulary()
    assert len(words) == len(set(words))
    assert {str(number) for number in range(45 + 9 + 1)} <= set(words), "every sum that can be asked"


def images(split: world.Split) -> list[bytes]:
    return [image.tobytes() for digit in world.handwriting(split).values() for image in digit]


def test_no_handwriting_is_in_two_splits() -> None:
    held = {split: images(split) for split in SPLITS}
    assert sum(len(found) for found in held.values()) == 1797
    assert all(set(world.handwriting(split)) == set(world.DIGITS) for split in SPLITS)
    for index, split in enumerate(SPLITS):
        for other in SPLITS[index + 1 :]:
            assert not set(held[split]) & set(held[other]), (split, other)


def test_questions_of_splits_and_seeds_differ() -> None:
    drawn = {
        (seed, split): tuple(item.text_question for item in world.draw_items(seed, split, ("sum", "read"), 20))
        for seed in (0, 1)
        for split in SPLITS
    }
    assert len(set(drawn.values())) == len(drawn)
    again = world.draw_items(0, "test", ("sum", "read"), 20)
    assert tuple(item.text_question for item in again) == drawn[0, "test"]


@pytest.mark.parametrize("glyphs", ["handwriting", "printed"])
def test_image_shows_each_word_in_its_own_tile(glyphs: Any) -> None:
    """The scene's k-th word is the k-th tile: a swatch is nearest to its own colour, and tiles do not move others."""
    for seed in range(20):
        scene = world.draw_item(np.random.default_rng(seed), "read").scene
        assert scene is not None
        pixels = np.asarray(world.render(np.random.default_rng(seed), scene, "test", glyphs), float)
        assert pixels.shape == (world.TILE, len(scene.words) * world.TILE, 3)
        for cell, colour in enumerate(scene.colours):
            left = 2 * cell * world.TILE
            seen = pixels[4:12, left + 4 : left + 12].mean((0, 1))
            nearest = min(world.COLOURS, key=lambda name: float(np.abs(seen - world.COLOURS[name]).sum()))
            assert nearest == colour


def test_same_stream_same_picture() -> None:
    scene = world.Scene(("red",) * 4, ("1", "2", "circle", "4"))
    one, other = (world.render(np.random.default_rng(3), scene, "test").tobytes() for _ in range(2))
    assert one == other
    assert one != world.render(np.random.default_rng(4), scene, "test").tobytes()
