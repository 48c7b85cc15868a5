"""The lab's world: four cells in a row, questions about them, and the answers.

A scene is four cells, each a colour and a glyph (a digit or a shape). It can be shown as an image (128×16 pixels: a
swatch tile and a glyph tile per cell) or told as text (the eight words in the same order, between the same
delimiters), so that one question has an image form and a text form with the same answer.

Digits are real handwriting: the UCI "Optical Recognition of Handwritten Digits" set (E. Alpaydin, C. Kaynak, 1998,
CC BY 4.0) as scikit-learn ships it, split by image so that no training image is in the test split.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
from PIL import Image, ImageDraw, ImageFont

Split = Literal["train", "calibration", "validation", "test"]
Glyphs = Literal["handwriting", "printed"]

CELLS = 4
TILE = 16  # pixels; one visual token per tile
COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (215, 40, 45),
    "green": (40, 165, 60),
    "blue": (45, 75, 215),
    "yellow": (235, 215, 50),
    "purple": (140, 50, 170),
    "orange": (240, 135, 30),
    "cyan": (50, 205, 215),
    "pink": (245, 150, 195),
}
SHAPES = ("circle", "square", "triangle", "cross")
DIGITS = tuple(str(number) for number in range(10))
POSITIONS = ("first", "second", "third", "fourth")
PERCEPTION = ("colour", "glyph", "read", "list_colours")
PHRASES: dict[str, str] = {
    "colour": "what colour is the {} cell ?",
    "glyph": "what glyph is the {} cell ?",
    "read": "read all glyphs",
    "list_colours": "list all colours",
    "sum": "what is the sum of all digits ?",
}
"""Task → the wording of its question; {} is a position."""


@dataclass(frozen=True)
class Scene:
    """Four colours and four glyphs, left to right."""

    colours: tuple[str, ...]
    glyphs: tuple[str, ...]

    @property
    def words(self) -> tuple[str, ...]:
        """The eight words in tile order: colour, glyph, colour, glyph, …"""
        return tuple(word for cell in zip(self.colours, self.glyphs, strict=True) for word in cell)


@dataclass(frozen=True)
class ExamItem:
    """One question with its answer; `scene` is None for questions without a scene (arithmetic facts)."""

    task: str
    question: str
    answer: str
    scene: Scene | None

    @property
    def text_question(self) -> str:
        """The question with the scene in words, for a text model."""
        if self.scene is None:
            return self.question
        return f"<|vision_start|> {' '.join(self.scene.words)} <|vision_end|> {self.question}"


def chain_of_thought(digits: Sequence[str]) -> str:
    """The sum worked out step by step, each digit written beside its operator: `<think> 4 + 5 = 9 ; … </think> 17`."""
    total, steps = int(digits[0]), []
    for digit in digits[1:]:
        steps.append(f"{total} + {digit} = {total + int(digit)}")
        total += int(digit)
    return f"<think> {' ; '.join(steps)} </think> {total}"


def draw_scene(rng: np.random.Generator, only_digits: bool, cells: int = CELLS) -> Scene:
    """A scene with independent colours; a glyph is a digit, or with probability 0.3 a shape unless `only_digits`."""
    colours = tuple(rng.choice(list(COLOURS), cells).tolist())
    shape = np.zeros(cells, bool) if only_digits else rng.random(cells) < 0.3
    glyphs = tuple(str(rng.choice(SHAPES if is_shape else DIGITS)) for is_shape in shape)
    return Scene(colours, glyphs)


def draw_item(rng: np.random.Generator, task: str) -> ExamItem:
    """One random question of the given kind: a task of `PHRASES`."""
    scene = draw_scene(rng, only_digits=task == "sum")
    position = int(rng.integers(CELLS))
    answers = {
        "colour": scene.colours[position],
        "glyph": scene.glyphs[position],
        "read": " ".join(scene.glyphs),
        "list_colours": " ".join(scene.colours),
        "sum": chain_of_thought(scene.glyphs) if task == "sum" else "",
    }
    return ExamItem(task, PHRASES[task].format(POSITIONS[position]), answers[task], scene)


@functools.cache
def handwriting(split: Split) -> dict[str, np.ndarray]:
    """Digit → its handwritten images of one split, uint8 `[n, 16, 16]` ink from 0 to 255.

    1,797 images of 8×8 in all: 60 % train, 10 % calibration, 12 % validation, 18 % test, stratified by digit.
    """
    from sklearn.datasets import load_digits

    data = load_digits()
    bounds = dict(zip(get_args(Split), ((0, 0.6), (0.6, 0.7), (0.7, 0.82), (0.82, 1.0)), strict=True))
    low, high = bounds[split]
    digits = {}
    for digit in range(10):
        images = data.images[data.target == digit]
        images = images[np.random.default_rng([7, digit]).permutation(len(images))]
        chosen = images[round(low * len(images)) : round(high * len(images))]
        digits[str(digit)] = np.stack([_enlarge(image * (255 / 16)) for image in chosen])
    return digits


def _enlarge(ink: np.ndarray) -> np.ndarray:
    small = Image.fromarray(ink.clip(0, 255).astype(np.uint8)).resize((14, 14), Image.Resampling.BILINEAR)
    return np.pad(np.asarray(small), 1)


@functools.cache
def _printed() -> dict[str, np.ndarray]:
    glyphs = {}
    for digit in DIGITS:
        image = Image.new("L", (TILE, TILE))
        ImageDraw.Draw(image).text((4, 1), digit, fill=255, font=ImageFont.load_default(size=13))
        glyphs[digit] = np.asarray(image)[None]
    return glyphs


@functools.cache
def _shapes() -> dict[str, np.ndarray]:
    shapes = {}
    for name in SHAPES:
        image = Image.new("L", (TILE, TILE))
        draw = ImageDraw.Draw(image)
        if name == "circle":
            draw.ellipse((3, 3, 12, 12), outline=255, width=2)
        elif name == "square":
            draw.rectangle((3, 3, 12, 12), outline=255, width=2)
        elif name == "triangle":
            draw.polygon(((8, 2), (13, 13), (2, 13)), fill=255)
        else:
            draw.line((3, 3, 12, 12), fill=255, width=2)
            draw.line((3, 12, 12, 3), fill=255, width=2)
        shapes[name] = np.asarray(image)[None]
    return shapes


def glyph_tile(rng: np.random.Generator, glyph: str, split: Split, glyphs: Glyphs) -> np.ndarray:
    """A glyph in dark ink on a light background, float32 `[16, 16, 3]` from 0 to 255."""
    if glyph in SHAPES:
        source = _shapes()[glyph]
    else:
        source = (handwriting(split) if glyphs == "handwriting" else _printed())[glyph]
    ink = source[rng.integers(len(source))].astype(np.float32) / 255
    ink = np.roll(ink, rng.integers(-1, 2, 2), (0, 1))[..., None]
    background = rng.uniform(150, 255) + rng.uniform(-10, 10, 3)
    stroke = rng.uniform(0, 70, 3)
    return background + (stroke - background) * ink


def colour_tile(rng: np.random.Generator, colour: str) -> np.ndarray:
    """A swatch of a colour on a grey background, float32 `[16, 16, 3]` from 0 to 255."""
    tile = np.empty((TILE, TILE, 3), np.float32)
    tile[:] = rng.uniform(0, 255)
    top, left = rng.integers(0, 4, 2)
    bottom, right = TILE - rng.integers(0, 4, 2)
    tile[top:bottom, left:right] = np.asarray(COLOURS[colour]) + rng.uniform(-18, 18, 3)
    return tile


def render(rng: np.random.Generator, scene: Scene, split: Split, glyphs: Glyphs = "handwriting") -> Image.Image:
    """The scene as a 128×16 RGB image: jittered tiles, random backgrounds, noise; digits in the split's handwriting."""
    tiles = []
    for colour, glyph in zip(scene.colours, scene.glyphs, strict=True):
        tiles += [colour_tile(rng, colour), glyph_tile(rng, glyph, split, glyphs)]
    pixels = np.concatenate(tiles, axis=1)
    pixels += rng.normal(0, 6, pixels.shape)
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))
