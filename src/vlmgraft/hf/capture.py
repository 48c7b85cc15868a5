"""What a VLM hands to its text model, captured once and replayed many times.

The vision tower and the token embeddings are frozen while gates are learned, so everything below the decoder layers
(image features, their places in the sequence, position ids, masks) is the same at every step. A pre-hook on the text
model records its keyword arguments and stops the forward pass; `replay` then runs text model and output head alone.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from vlmgraft.hf.models import output_head, text_model

Captured = dict[str, Any]


class _Stop(Exception):  # noqa: N818 (control flow, not an error)
    """Ends a forward pass once the text model's inputs are known."""


@torch.no_grad()
def capture_text_inputs(model: Any, batch: Mapping[str, Any]) -> Captured:
    """The keyword arguments that `model(**batch)` passes to its text model, detached."""
    decoder, found = text_model(model), {}

    def record(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        found.update(inspect.signature(module.forward).bind_partial(*args).arguments)
        found.update(kwargs)
        raise _Stop

    handle = decoder.register_forward_pre_hook(record, with_kwargs=True)
    try:
        model(**batch, use_cache=False)
    except _Stop:
        pass
    finally:
        handle.remove()
    return {key: value for key, value in found.items() if value is not None} | {"use_cache": False}


def replay(model: Any, captured: Captured, predicts: Tensor) -> Tensor:
    """Logits [N, vocabulary] at the N positions of the mask `predicts` [batch, length]."""
    return output_head(model)(replay_hidden(model, captured)[predicts])


def replay_hidden(model: Any, captured: Captured) -> Tensor:
    """Hidden states [batch, length, hidden] after the text model's last norm."""
    return text_model(model)(**captured)[0]


def plain(model: Any, batch: Mapping[str, Any], predicts: Tensor) -> Tensor:
    """The same logits by the model's ordinary forward pass: replay's slow twin, and its replacement where it fails."""
    return model(**batch, use_cache=False).logits[predicts]


@torch.no_grad()
def replay_is_exact(model: Any, batch: Mapping[str, Any], predicts: Tensor) -> bool:
    """Whether replay gives the ordinary forward pass's logits; models that scale or cap logits, for example, do not."""
    expected = plain(model, batch, predicts)
    found = replay(model, capture_text_inputs(model, batch), predicts)
    tolerance = 32 * torch.finfo(expected.dtype).eps * float(expected.abs().max())
    return expected.shape == found.shape and float((expected - found).abs().max()) <= tolerance
