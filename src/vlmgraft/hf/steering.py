"""Activation steering: a direction from a donor of any architecture, added to a VLM's hidden states (arXiv 2511.17910).

    h' = ‖h‖ · (h + a·(‖h‖/‖d‖)·d) / ‖h + a·(‖h‖/‖d‖)·d‖          h: every token's state after one decoder layer

d is the donor's direction, low-pass filtered and resampled to the VLM's width by its Fourier transform along the width
(`resample`). The norm of h is kept. a is relative to ‖h‖, our choice: two models' hidden states differ in scale. At
a = 0 the model's states are unchanged.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from safetensors import SafetensorError, safe_open
from torch import Tensor

from vlmgraft.checkpoint.writer import save_tensors
from vlmgraft.errors import AlignmentError, CheckpointError, RecipeError
from vlmgraft.hf.modules import hook_states, text_model

TENSOR = "direction"


@dataclass(frozen=True)
class Steering:
    """direction: float32 [width of the VLM]. layer: the VLM's layer, counted from 0, after which it is added. strength:
    a. made_from: JSON values that describe its source."""

    direction: Float[Tensor, " width"]
    layer: int
    strength: float
    made_from: Mapping[str, Any] = field(default_factory=dict)

    def save(self, path: Path) -> None:
        """Write a safetensors file with a receipt in its header; raises OSError."""
        receipt = {"layer": self.layer, "strength": self.strength, "made_from": dict(self.made_from)}
        save_tensors({TENSOR: self.direction.contiguous()}, path, {"steering": json.dumps(receipt)})

    @classmethod
    def load(cls, path: str | Path) -> Steering:
        """Read a file that `save` wrote; raises CheckpointError."""
        try:
            with safe_open(path, framework="pt") as file:
                receipt = json.loads(file.metadata()["steering"])
                return cls(
                    file.get_tensor(TENSOR), int(receipt["layer"]), float(receipt["strength"]), receipt["made_from"]
                )
        except (SafetensorError, OSError, ValueError, TypeError, KeyError) as error:
            raise CheckpointError(f"{path}: is no steering vector ({error!s:.200}); make one with `steer`") from error

    @contextmanager
    def applied(self, model: Any, strength: float | None = None) -> Iterator[None]:
        """Add the direction to the model inside the context; the model is restored on exit, also after an exception.

        Raises:
            AlignmentError: the model has another width, or no such layer. RecipeError: the strength is not finite.
        """
        strength = self.strength if strength is None else strength
        decoder = text_model(model)
        width = model.config.get_text_config(decoder=True).hidden_size
        if width != len(self.direction) or not 0 <= self.layer < len(decoder.layers):
            raise AlignmentError(
                f"{type(model).__name__}: has {len(decoder.layers)} layers of width {width}; the vector is for "
                f"layer {self.layer} and width {len(self.direction)}: make it for this model"
            )
        if not abs(strength) < float("inf"):
            raise RecipeError(f"steering strength: {strength} must be finite")

        def add(states: Tensor) -> Tensor:
            return steer_states(states, self.direction.to(states.device), strength)

        with hook_states(decoder.layers[self.layer], add) if strength else nullcontext():
            yield


def steer_states(
    states: Float[Tensor, "*batch width"], direction: Float[Tensor, " width"], strength: float
) -> Float[Tensor, "*batch width"]:
    """h' of every state, in float32 inside and in the states' dtype outside; states of zero stay zero."""
    h = states.float()
    norm = h.norm(dim=-1, keepdim=True)
    moved = h + strength * norm * (direction / direction.norm())
    return (moved * (norm / moved.norm(dim=-1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny))).to(states)


def resample(direction: Float[Tensor, " donor"], width: int, kept: float) -> Float[Tensor, " width"]:
    """A direction's lowest frequencies along its width, resampled to another width; float32.

    Args:
        kept: share of the donor's frequencies, from the lowest on (above 0 to 1); those that the new width cannot hold
            are dropped. At `kept` 1 and the donor's own width the direction itself comes back.
    Raises:
        RecipeError: `kept` is outside this range.
    """
    if not 0 < kept <= 1:
        raise RecipeError(f"kept: {kept} must be above 0 and at most 1")
    frequencies = torch.fft.rfft(direction.double())
    count = max(1, round(kept * len(frequencies)))
    fitted = torch.zeros(width // 2 + 1, dtype=frequencies.dtype)
    shared = min(count, len(fitted))
    fitted[:shared] = frequencies[:shared]
    return (torch.fft.irfft(fitted, n=width) * (width / len(direction))).float()
