"""The lab's world: four cells in a row, questions about them, and the answers.

A scene is four cells, each a colour and a glyph (a digit or a shape). It can be shown as an image (128×16 pixels: a
swatch tile and a glyph tile per cell) or told as text (the eight words in the same order, between the same
delimiters), so that one question has an image form and a text form with the same answer.

Digits are real handwriting: the UCI "Optical Recognition of Handwritten Digits" set (E. Alpaydin, C. Kaynak, 1998,
CC BY 4.0) as scikit-learn ships it, split by image so that no training digit is ever tested on.
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
Task = Literal[
    "colour", "glyph", "read", "list_colours", "sum", "copy", "fact",
    "small_digits", "large_digits", "reworded", "five_digits", "difference", "numbers",
]  # fmt: skip

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
PERCEPTION: tuple[Task, ...] = ("colour", "glyph", "read", "list_colours")
TEXT_ONLY: tuple[Task, ...] = ("copy", "fact")
TRANSFER: tuple[Task, ...] = ("small_digits", "large_digits", "reworded", "five_digits", "difference")
"""Beside the sum: sums of digits up to 4, of digits from 5, in other words, of five digits, and differences."""
TRANSFER_TEXT: tuple[Task, ...] = ("numbers",)
"""Sums of numbers from 5 to 15, which no glyph shows."""
LARGEST_NUMBER = 63
PHRASES: dict[str, str] = {
    "colour": "what colour is the {} cell ?",
    "glyph": "what glyph is the {} cell ?",
    "read": "read all glyphs",
    "list_colours": "list all colours",
    "sum": "what is the sum of all digits ?",
    "copy": "copy",
    "fact": "what is {} + {} ?",
}
TRANSFER_PHRASES: dict[str, str] = {  # of the vocabulary's words alone: it must stay as it is
    "reworded": "what is the sum of all glyphs ?",
    "difference": "what is the first cell - the second cell ?",
}


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
class Item:
    """One question with its answer; `scene` is None for questions about no scene (arithmetic facts)."""

    task: Task
    question: str
    answer: str
    scene: Scene | None

    @property
    def text_question(self) -> str:
        """The question with the scene told in words, as a text model is asked."""
        if self.scene is None:
            return self.question
        return f"<|vision_start|> {' '.join(self.scene.words)} <|vision_end|> {self.question}"


def vocabulary() -> list[str]:
    """Every word of the world, special tokens first; the position in the list is the token id."""
    special = ["<pad>", "<unk>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>"]
    special += ["<|image_pad|>", "<|video_pad|>", "<think>", "</think>"]
    phrases = [word for phrase in PHRASES.values() for word in phrase.split() if word != "{}"]
    words = ["user", "assistant", "system", *COLOURS, *SHAPES, *POSITIONS, *phrases, "=", ";", "-"]
    numbers = [str(number) for number in range(LARGEST_NUMBER + 1)]
    return list(dict.fromkeys([*special, *numbers, *words]))


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


def draw_item(rng: np.random.Generator, task: Task) -> Item:
    """One random question of the given kind."""
    if task in TRANSFER or task in TRANSFER_TEXT:
        return _draw_transfer(rng, task)
    if task == "fact":
        first, second = int(rng.integers(0, 46)), int(rng.integers(0, 10))
        return Item(task, PHRASES[task].format(first, second), str(first + second), None)
    if task == "copy":
        words = rng.choice([*COLOURS, *SHAPES, *(str(n) for n in range(LARGEST_NUMBER + 1))], rng.integers(2, 7))
        return Item(task, f"{PHRASES[task]} {' '.join(words)}", " ".join(words), None)
    scene = draw_scene(rng, only_digits=task == "sum")
    position = int(rng.integers(CELLS))
    answers = {
        "colour": scene.colours[position],
        "glyph": scene.glyphs[position],
        "read": " ".join(scene.glyphs),
        "list_colours": " ".join(scene.colours),
        "sum": chain_of_thought(scene.glyphs) if task == "sum" else "",
    }
    return Item(task, PHRASES[task].format(POSITIONS[position]), answers[task], scene)


def _draw_transfer(rng: np.random.Generator, task: Task) -> Item:
    """A question that is not of the kind the trio was tuned on."""
    scene = draw_scene(rng, only_digits=True, cells=5 if task == "five_digits" else CELLS)
    glyphs = list(scene.glyphs)
    low, high = {"small_digits": (0, 5), "large_digits": (5, 10), "numbers": (5, 16)}.get(task, (0, 0))
    if high:
        glyphs = rng.integers(low, high, CELLS).astype(str).tolist()
    answer = chain_of_thought(glyphs)
    if task == "difference":
        glyphs[:2] = sorted(glyphs[:2], reverse=True)
        left = int(glyphs[0]) - int(glyphs[1])
        answer = f"<think> {glyphs[0]} - {glyphs[1]} = {left} </think> {left}"
    return Item(task, TRANSFER_PHRASES.get(task, PHRASES["sum"]), answer, Scene(scene.colours, tuple(glyphs)))


def draw_items(seed: int, split: Split, tasks: tuple[Task, ...], count: int) -> list[Item]:
    """`count` questions of each kind, shuffled; splits and seeds never share a random stream."""
    rng = np.random.default_rng([seed, get_args(Split).index(split), 20])
    items = [draw_item(rng, task) for task in tasks for _ in range(count)]
    return [items[index] for index in rng.permutation(len(items))]


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
    def paint(name: str) -> np.ndarray:
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
        return np.asarray(image)[None]

    return {name: paint(name) for name in SHAPES}


def _glyph_tile(rng: np.random.Generator, glyph: str, split: Split, glyphs: Glyphs) -> np.ndarray:
    if glyph in SHAPES:
        source = _shapes()[glyph]
    else:
        source = (handwriting(split) if glyphs == "handwriting" else _printed())[glyph]
    ink = source[rng.integers(len(source))].astype(np.float32) / 255
    ink = np.roll(ink, rng.integers(-1, 2, 2), (0, 1))[..., None]
    background = rng.uniform(150, 255) + rng.uniform(-10, 10, 3)
    stroke = rng.uniform(0, 70, 3)
    return background + (stroke - background) * ink


def _colour_tile(rng: np.random.Generator, colour: str) -> np.ndarray:
    tile = np.empty((TILE, TILE, 3), np.float32)
    tile[:] = rng.uniform(0, 255)
    top, left = rng.integers(0, 4, 2)
    bottom, right = TILE - rng.integers(0, 4, 2)
    tile[top:bottom, left:right] = np.asarray(COLOURS[colour]) + rng.uniform(-18, 18, 3)
    return tile


def render(rng: np.random.Generator, scene: Scene, split: Split, glyphs: Glyphs = "handwriting") -> Image.Image:
    """The scene as a 128×16 RGB image: jittered tiles, random backgrounds, noise; digits of the split's hands."""
    tiles = []
    for colour, glyph in zip(scene.colours, scene.glyphs, strict=True):
        tiles += [_colour_tile(rng, colour), _glyph_tile(rng, glyph, split, glyphs)]
    pixels = np.concatenate(tiles, axis=1)
    pixels += rng.normal(0, 6, pixels.shape)
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))
