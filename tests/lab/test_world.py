"""The world: chains of thought that are true, splits that share no hand, pictures that show what is told."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, strategies as st

from vlmgraft.lab import world

SPLITS: tuple[world.Split, ...] = ("train", "calibration", "validation", "test")
seeds = st.integers(0, 2**32 - 1)


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


def images(split: world.Split) -> list[bytes]:
    return [image.tobytes() for digit in world.handwriting(split).values() for image in digit]


def test_no_handwriting_is_in_two_splits() -> None:
    held = {split: images(split) for split in SPLITS}
    assert sum(len(found) for found in held.values()) == 1797
    assert all(set(world.handwriting(split)) == set(world.DIGITS) for split in SPLITS)
    for index, split in enumerate(SPLITS):
        for other in SPLITS[index + 1 :]:
            assert not set(held[split]) & set(held[other]), (split, other)


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
