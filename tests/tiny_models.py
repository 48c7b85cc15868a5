"""A tiny VLM, a donor, factors of a random task vector, and questions about random images."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy
import pytest
import torch
from PIL import Image

from experiments.lab.models import build_processor, build_text_model, build_vlm
from vlmgraft.distillation.distill import Distiller
from vlmgraft.hf.batches import Question
from vlmgraft.hf.modules import text_linears
from vlmgraft.spectral.factors import Factors, factorize


def _random_image(seed: int) -> Image.Image:
    pixels = numpy.random.default_rng(seed).integers(0, 255, (16, 128, 3), dtype=numpy.uint8)
    return Image.fromarray(pixels)


def _image_questions(count: int, first: int = 0) -> list[Question]:
    words = ["colour 1", "read glyphs now", "sum"]
    return [Question(words[i % 3], (_random_image(i),)) for i in range(first, first + count)]


@pytest.fixture(scope="session")
def questions() -> list[Question]:
    return _image_questions(24)


@pytest.fixture(scope="session")
def held_out() -> list[Question]:
    return _image_questions(12, first=1000)


def random_factors(vlm: Any) -> dict[str, Factors]:
    """A random task vector, a third of the weights' size, under its tensor names on disk."""
    generator = torch.Generator().manual_seed(0)
    taus = {
        f"model.{role}": 0.3 * linear.weight.std().item() * torch.randn(linear.weight.shape, generator=generator)
        for role, linear in text_linears(vlm).items()
    }
    return {name: factorize(tau, name, name.removeprefix("model.")) for name, tau in taus.items()}


@pytest.fixture(scope="session")
def factors(vlm: Any) -> dict[str, Factors]:
    return random_factors(vlm)


@pytest.fixture(scope="session")
def distiller(vlm: Any, processor: Any, factors: dict[str, Factors], questions: Any, held_out: Any) -> Distiller:
    return Distiller(vlm, processor, factors, questions, held_out, max_new_tokens=6, batch_size=12)


@pytest.fixture(scope="session")
def vlm() -> Any:
    return build_vlm(0).eval()


@pytest.fixture(scope="session")
def donor() -> Any:
    return build_text_model(1).eval()


@pytest.fixture(scope="session")
def processor() -> Any:
    return build_processor()


@pytest.fixture(scope="session")
def llm() -> Any:
    return build_text_model(0).eval()


@pytest.fixture(scope="session")
def random_image() -> Callable[[int], Image.Image]:
    return _random_image


@pytest.fixture(scope="session")
def image_questions() -> Callable[..., list[Question]]:
    return _image_questions
