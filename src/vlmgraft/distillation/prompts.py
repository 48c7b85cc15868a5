"""Prompts with a teacher's answers, in batches, as one model reads them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from vlmgraft.distillation.targets import Distribution, TargetBatch, moved
from vlmgraft.hf.batches import Batch, Question, append_answers, encode, text_positions, to_device
from vlmgraft.hf.capture import Captured, capture_text_inputs, replay_is_exact
from vlmgraft.hf.features import ImageFeatures, without_pixels
from vlmgraft.hf.modules import tokenizer_of

Tokens = Literal["answer", "all"]
Side = tuple[Any, Any]
"""A model and its processor, or tokenizer."""

_PLACEHOLDERS = ("image_token_id", "image_token_index", "video_token_id", "video_token_index")


@dataclass
class Prompts:
    """Prompts with the teacher's answers, as one model reads them, in batches."""

    side: Side
    questions: Sequence[Question]
    answers: Sequence[Sequence[int]]
    groups: Sequence[Sequence[int]]
    placeholders: set[int]
    tokens: Tokens
    features: ImageFeatures | None = None
    exact: bool | None = None

    def batch(self, index: int, *, replayed: bool = True) -> TargetBatch:
        """Batch `index` without a target, on the CPU; with the text model's inputs captured, if replay is exact."""
        nothing = Distribution(torch.empty(0), None)
        if replayed and self.exact is not False:
            captured, ids, predicts = self._captured(index)
            if captured is not None:
                return TargetBatch(ids, lambda: self._inputs(index)[0], captured, predicts, nothing)
        inputs, predicts = self._inputs(index)
        return TargetBatch(inputs["input_ids"], lambda: inputs, None, predicts, nothing)

    def _captured(self, index: int) -> tuple[Captured | None, Tensor, Tensor]:
        """The text model's inputs, on the CPU, or None if their replay is not exact (tested with the first batch);
        token ids, and which positions count."""
        model, numbers = self.side[0], self.groups[index]
        features = self.features or ImageFeatures(model, self.placeholders)
        while True:
            read, predicts = self._inputs(index, pixels=not features.rows)
            if features.rows:
                kept = features.stand_for(numbers, read)
                read = without_pixels(read) if kept else self._inputs(index)[0]
            inputs = moved(read, model.device)
            with features.recalled(numbers):
                captured = capture_text_inputs(model, inputs)
                agreed = features.agree(numbers, inputs["input_ids"], captured)
                if agreed and self.exact is None:
                    self.exact = replay_is_exact(model, inputs, predicts.to(model.device))
            if agreed:
                return moved(captured, "cpu") if self.exact else None, read["input_ids"], predicts

    def answered(self, index: int) -> tuple[Tensor, Tensor, Tensor]:
        """Token ids, which positions count, and which of them predict the answer's tokens, [batch, length] each."""
        inputs, answered = self._appended(index, pixels=False)
        return inputs["input_ids"], self._counting(inputs, answered), answered

    def _appended(self, index: int, pixels: bool) -> tuple[Batch, Tensor]:
        processor, chosen = self.side[1], [self.questions[i] for i in self.groups[index]]
        replies = [self.answers[i] for i in self.groups[index]]
        prompts = encode(processor, chosen, pixels=pixels)
        return append_answers(prompts, replies, tokenizer_of(processor).pad_token_id or 0)

    def _counting(self, inputs: Batch, answered: Tensor) -> Tensor:
        return text_positions(inputs, self.placeholders) if self.tokens == "all" else answered

    def _inputs(self, index: int, *, pixels: bool = True) -> tuple[Batch, Tensor]:
        """The model's inputs, on the CPU, and which positions count; pixels: as in `encode`."""
        inputs, answered = self._appended(index, pixels)
        return to_device(inputs, "cpu", self.side[0].dtype), self._counting(inputs, answered)


def placeholders(model: Any) -> set[int]:
    """Token ids that stand for images and videos."""
    return {token for key in _PLACEHOLDERS if (token := getattr(model.config, key, None)) is not None}


def before_placeholders(placeholders: set[int], answer: list[int]) -> list[int]:
    """The answer up to the first image or video placeholder, which would ask for an image when read back as input."""
    return answer[: next((index for index, token in enumerate(answer) if token in placeholders), len(answer))]
