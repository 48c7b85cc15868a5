"""The inputs of a VLM's text model, captured once and replayed many times.

The vision tower and the token embeddings are frozen while gates are learned, so everything below the decoder layers
(image features, their places in the sequence, position ids, masks) is the same at every step. A pre-hook on the text
model records its keyword arguments and stops the forward pass; `replay` then runs text model and output head alone.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vlmgraft.hf.modules import output_head, text_model

Captured = dict[str, Any]
REPLAY_TOLERANCE = {torch.float32: 1e-5}
"""Largest mean KL per token in nats between the ordinary pass and a replay; `REPLAY_TOLERANCE_LOW` in 16 bits."""
REPLAY_TOLERANCE_LOW = 2e-3


class _Stop(Exception):  # noqa: N818 (control flow, not an error)
    """Ends a forward pass once the text model's inputs are known."""


@torch.no_grad()
def capture_text_inputs(model: Any, batch: Mapping[str, Any]) -> Captured:
    """The keyword arguments that `model(**batch)` passes to its text model, detached."""
    decoder, arguments = text_model(model), {}

    def record(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        arguments.update(inspect.signature(module.forward).bind_partial(*args).arguments)
        arguments.update(kwargs)
        raise _Stop

    hook = decoder.register_forward_pre_hook(record, with_kwargs=True, prepend=True)  # before those of FSDP2
    with suppress(_Stop), hook:
        model(**batch, use_cache=False)
    return {key: value for key, value in arguments.items() if value is not None} | {"use_cache": False}


def replay(model: Any, captured: Captured, predicts: Tensor) -> Tensor:
    """Logits [N, vocabulary] at the N positions of the mask `predicts` [batch, length]."""
    return head_logits(model, replay_hidden(model, captured)[predicts])


def head_logits(model: Any, hidden: Tensor) -> Tensor:
    """Logits of hidden states [N, hidden]; cap · tanh(logits / cap) for models with a soft cap, such as Gemma."""
    logits = output_head(model)(hidden)
    cap = getattr(model.config.get_text_config(decoder=True), "final_logit_softcapping", None)
    return logits if cap is None else cap * torch.tanh(logits / cap)


def replay_hidden(model: Any, captured: Captured) -> Tensor:
    """Hidden states [batch, length, hidden] after the text model's last norm."""
    return text_model(model)(**captured)[0]


def plain(model: Any, batch: Mapping[str, Any], predicts: Tensor) -> Tensor:
    """The same logits by the model's ordinary forward pass: slower, and the fallback if replay is not exact."""
    return model(**batch, use_cache=False).logits[predicts]


@torch.no_grad()
def replay_is_exact(model: Any, batch: Mapping[str, Any], predicts: Tensor) -> bool:
    """Whether replay gives the ordinary forward pass's distributions; for models that scale their logits it does not.

    Compared by KL divergence: the loss is what matters, and a tolerance on bfloat16 logits is a quarter of a nat.
    """
    expected = plain(model, batch, predicts)
    replayed = replay(model, capture_text_inputs(model, batch), predicts)
    if expected.shape != replayed.shape:
        return False
    log_p, log_q = (logits.float().log_softmax(-1) for logits in (expected, replayed))
    kl = F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1).mean()
    return float(kl) <= REPLAY_TOLERANCE.get(expected.dtype, REPLAY_TOLERANCE_LOW)
