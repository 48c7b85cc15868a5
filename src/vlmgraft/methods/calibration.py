"""The calibration prompts of methods with gates, as a recipe gives them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from vlmgraft.errors import RecipeError
from vlmgraft.storage.urls import check_url

BATCHES = ("batch_size", "batch_tokens", "answer_batch_size", "answer_batch_tokens")
"""Fields that limit the batches of training and of answering."""


@dataclass(frozen=True)
class Calibration:
    """The prompts that gates are learned on, and those on which the KL is measured."""

    data: str
    """Question file with images, relative to where the command runs, or a data set, with its split as NAME:SPLIT."""
    samples: int = 512
    """Questions that are learned from."""
    held_out: int = 128
    """Further questions, on which the KL is measured."""
    max_new_tokens: int = 64
    """Length of the VLM's answers, tokens."""
    batch_size: int = 8
    """Questions in a batch of the training."""
    answer_batch_size: int = 32
    """Questions that the VLM answers at once."""
    answer_batch_tokens: int = 65536
    """Tokens of a batch that the VLM answers, images, padding and answers included."""
    batch_tokens: int = 16384
    """Tokens of a batch of the training, images and padding included: longer prompts make smaller batches."""
    max_pixels: int = 1_003_520
    """Larger images are scaled down to this many pixels, 1,280 tokens of a Qwen2.5-VL."""
    packing: Literal["length", "shuffle"] = "length"
    """Batches of similar length (little padding), or shuffled."""
    tokens: Literal["answer", "all"] = "answer"
    """Tokens on which the KL is taken: those of the answer, or of all text."""
    columns: Mapping[str, str] = field(default_factory=dict)
    """Column names: ours (question, image, …) → the data's."""
    endpoint: str | None = None
    """Address of a server of the VLM (vLLM, SGLang) that answers the questions in its place, http://…/v1."""

    def __post_init__(self) -> None:
        for name in ("samples", "max_new_tokens", *BATCHES, "max_pixels"):
            if getattr(self, name) < 1:
                raise RecipeError(f"method.calibration.{name}: {getattr(self, name)} must be at least 1")
        if self.held_out < 0:
            raise RecipeError(f"method.calibration.held_out: {self.held_out} must not be negative")
        if self.endpoint is not None:
            check_url(self.endpoint, "method.calibration.endpoint")
