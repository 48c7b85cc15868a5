"""Pictures of four cells, questions about them in plain English, and arithmetic word problems.

The cells are those of the lab (`vlmgraft.lab.world`): a colour swatch and a handwritten digit each. Here they stand
below each other in a 64×64 picture, so that a tower with patches of 16 pixels gives four tokens per row, one for each
token of " red 3," in the base model's vocabulary.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

from vlmgraft.lab import world
from vlmgraft.lab.world import Scene

SIDE = 64
IMAGE_TOKENS = 16
SUM_QUESTIONS = (
    "What is the sum of the four digits?",
    "Add up the digits on the cards.",
    "What do all the digits add up to?",
    "What is the total of the digits?",
)
PERCEPTION = ("digit", "color", "list", "read", "find")
NAMES = ("Tom", "Anna", "Sam", "Maria", "Ben", "Lucy", "Omar", "Nina")
THINGS = ("apples", "books", "coins", "stamps", "marbles", "eggs", "pencils", "cookies", "shells", "tickets")
DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday")
TOPICS = (
    "the sea", "a dog", "winter", "music", "bread", "the moon", "a bicycle", "friendship", "a garden", "the school",
    "trains", "rain", "a cat", "coffee", "mountains", "football", "the sun", "a library", "birds", "a river",
)  # fmt: skip
REQUESTS = (
    "Write one sentence about {}.",
    "What is special about {}?",
    "Name three things that go with {}.",
    "Explain {} to a child.",
    "Give me a short title for a story about {}.",
    "Tell me a fact about {}.",
)
GENERAL_PROMPTS = tuple(request.format(topic) for topic in TOPICS for request in REQUESTS)
"""Prompts that have nothing to do with the scenes; the base's answers to them are replayed in every tuning."""


@dataclass(frozen=True)
class Example:
    """One question with its answer. scene: shown or told with it, None for a word problem. task: a kind of perception,
    "sum" or "words"."""

    question: str
    answer: str
    task: str
    scene: Scene | None = None

    @property
    def text_prompt(self) -> str:
        """The question with the scene told in words."""
        return self.question if self.scene is None else f"Cards:{described(self.scene)}\n{self.question}"


def described(scene: Scene) -> str:
    """Such as " red 3, blue 5, pink 0, green 8,": four tokens per cell."""
    return "".join(f" {colour} {digit}," for colour, digit in zip(scene.colours, scene.glyphs, strict=True))


def picture(rng: np.random.Generator, scene: Scene, split: world.Split) -> np.ndarray:
    """The scene as uint8 `[64, 64, 3]`; digits are of the split's handwriting."""
    shade = rng.uniform(90, 200) + rng.normal(0, 12, (8, 8, 3))
    small = Image.fromarray(shade.clip(0, 255).astype(np.uint8))
    pixels = np.asarray(small.resize((SIDE, SIDE), Image.Resampling.BILINEAR)).astype(np.float32)
    for row, (colour, digit) in enumerate(zip(scene.colours, scene.glyphs, strict=True)):
        at = slice(world.TILE * row, world.TILE * (row + 1))
        pixels[at, : world.TILE] = world.colour_tile(rng, colour)
        pixels[at, 2 * world.TILE : 3 * world.TILE] = world.glyph_tile(rng, digit, split, "handwriting")
    return (pixels + rng.normal(0, 6, pixels.shape)).clip(0, 255).astype(np.uint8)


def worked_out(numbers: Sequence[int]) -> str:
    """A sum step by step, each number written beside its operator, and the result at the end."""
    total, steps = numbers[0], []
    for number in numbers[1:]:
        steps.append(f"{total} + {number} = {total + number}")
        total += number
    return f"{'; '.join(steps)}. The sum is {total}."


def sum_example(rng: np.random.Generator, scene: Scene | None = None) -> Example:
    """The sum of a scene's digits; a random scene by default."""
    scene = scene or world.draw_scene(rng, only_digits=True)
    return Example(str(rng.choice(SUM_QUESTIONS)), worked_out([int(digit) for digit in scene.glyphs]), "sum", scene)


def perception_example(rng: np.random.Generator, scene: Scene | None = None, task: str | None = None) -> Example:
    """A question that looking answers; a random scene and kind by default. "find" needs a colour that is there once."""
    scene = scene or world.draw_scene(rng, only_digits=True)
    task = task or str(rng.choice(PERCEPTION))
    unique = [at for at, colour in enumerate(scene.colours) if scene.colours.count(colour) == 1]
    if task == "find" and not unique:
        task = "digit"
    at = int(rng.choice(unique)) if task == "find" else int(rng.integers(world.CELLS))
    position, colour, digit = world.POSITIONS[at], scene.colours[at], scene.glyphs[at]
    question, answer = {
        "digit": (f"Which digit is on the {position} card?", digit),
        "color": (f"Which color is the {position} card?", colour),
        "list": ("List the colors of the cards.", ", ".join(scene.colours)),
        "read": ("Read the digits on the cards.", ", ".join(scene.glyphs)),
        "find": (f"Which digit is on the {colour} card?", digit),
    }[task]
    return Example(question, answer, task, scene)


def word_problem(rng: np.random.Generator) -> Example:
    """A sum of two to four numbers from 1 to 9, in words or in figures, about no picture."""
    numbers = rng.integers(1, 10, rng.integers(2, 5)).tolist()
    name, thing = str(rng.choice(NAMES)), str(rng.choice(THINGS))
    boxes = ", ".join(f"{n} {thing} in the {at} box" for n, at in zip(numbers, world.POSITIONS, strict=False))
    sales = " ".join(f"On {day} {name} sells {n} {thing}." for n, day in zip(numbers, DAYS, strict=False))
    gifts = " ".join(f"Then {name} finds {n} more." for n in numbers[1:])
    question = (
        f"{name} has {numbers[0]} {thing}. {gifts} How many {thing} does {name} have now?",
        f"There are {boxes}. How many {thing} are there in all?",
        f"What is {' + '.join(map(str, numbers))}?",
        f"{sales} How many {thing} is that altogether?",
    )[int(rng.integers(4))]
    return Example(question, worked_out(numbers), "words")


def fifth_number(rng: np.random.Generator) -> Example:
    """A sum of five: the scene's digits and one that the question names. No donor is tuned on sums of so many."""
    scene, more = world.draw_scene(rng, only_digits=True), int(rng.integers(1, 10))
    numbers = [*(int(digit) for digit in scene.glyphs), more]
    return Example(f"What is the sum of the four digits and {more}?", worked_out(numbers), "sum", scene)


def difference(rng: np.random.Generator) -> Example:
    """The larger of two digits minus the smaller. No donor is tuned on subtraction."""
    scene = world.draw_scene(rng, only_digits=True)
    first, second = (int(at) for at in rng.permutation(world.CELLS)[:2])
    if int(scene.glyphs[first]) < int(scene.glyphs[second]):
        first, second = second, first
    large, small = int(scene.glyphs[first]), int(scene.glyphs[second])
    question = (
        f"What is the digit on the {world.POSITIONS[first]} card minus the digit on the {world.POSITIONS[second]} card?"
    )
    return Example(question, f"{large} - {small} = {large - small}.", "sum", scene)


def final_number(text: str) -> int | None:
    """The last whole number of an answer."""
    numbers = re.findall(r"-?\d+", text)
    return int(numbers[-1]) if numbers else None


def has_chain(text: str) -> bool:
    """Whether an answer works its sum out: it holds an addition or a subtraction and its result."""
    return re.search(r"[+-].*=", text) is not None


def is_right(example: Example, output: str) -> bool:
    """A sum by its last number, everything else word for word."""
    if example.task in ("sum", "words"):
        return final_number(output) == final_number(example.answer)
    return output.strip().rstrip(".") == example.answer
