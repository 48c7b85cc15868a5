"""An exam that reads right and wrong off the model's own logits, and comparisons of a model's bits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch


@dataclass
class LogitExam:
    """No questions: an item is right when the model's likeliest next word has an even number. It changes with the
    weights, costs one forward pass, and counts how often it was taken. fail_at: raise at that call."""

    reasoning: Sequence[str] = ("sum",)
    perception: Sequence[str] = ("colour", "read")
    label: str = "logits"
    calls: int = 0
    fail_at: int | None = None
    seen: list[torch.Tensor] = field(default_factory=list)

    @torch.no_grad()
    def __call__(self, model: Any) -> Mapping[str, Sequence[bool]]:
        self.calls += 1
        if self.calls == self.fail_at:
            raise KeyboardInterrupt
        ids = torch.arange(10, 58).reshape(6, 8)
        logits = model(input_ids=ids).logits
        self.seen.append(logits)
        even = (logits.argmax(-1) % 2 == 0).flatten().tolist()
        return {"sum": even[:16], "colour": even[16:32], "read": even[32:]}


def bits(model: Any) -> dict[str, torch.Tensor]:
    """A copy of every tensor of the model."""
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same_bits(model: Any, before: Mapping[str, torch.Tensor]) -> bool:
    """Whether the model holds the very same values."""
    now = model.state_dict()
    return now.keys() == before.keys() and all(torch.equal(now[name], before[name]) for name in before)
