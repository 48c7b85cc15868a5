"""A tiny VLM, a tiny text model and questions about random images."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy
import pytest
from PIL import Image

from vlmgraft.hf.data import Question
from vlmgraft.lab.models import build_processor, build_text_model, build_vlm


def _random_image(seed: int) -> Image.Image:
    pixels = numpy.random.default_rng(seed).integers(0, 255, (16, 128, 3), dtype=numpy.uint8)
    return Image.fromarray(pixels)


def _image_questions(count: int, first: int = 0) -> list[Question]:
    words = ["colour 1", "read glyphs now", "sum"]
    return [Question(words[i % 3], (_random_image(i),)) for i in range(first, first + count)]


@pytest.fixture(scope="session")
def random_image() -> Callable[[int], Image.Image]:
    return _random_image


@pytest.fixture(scope="session")
def image_questions() -> Callable[..., list[Question]]:
    return _image_questions


@pytest.fixture(scope="session")
def vlm() -> Any:
    return build_vlm(0).eval()


@pytest.fixture(scope="session")
def llm() -> Any:
    return build_text_model(0).eval()


@pytest.fixture(scope="session")
def processor() -> Any:
    return build_processor()
