"""Other weights in a model in memory, inside a context: the parameters by role, and swapping their data.

A role is a tensor's name inside the text model under Llama's names, such as "layers.3.self_attn.q_proj.weight": the end
of its name on disk and of its parameter's name, in every family whose tensors are modules of their own.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from vlmgraft.alignment.view import text_view
from vlmgraft.checkpoint.index import Checkpoint
from vlmgraft.checkpoint.reader import Reader
from vlmgraft.errors import AlignmentError
from vlmgraft.hf.modules import text_model


def text_parameters(model: Any) -> dict[str, nn.Parameter]:
    """Role → parameter of the text model; a tied head is the embeddings and is not listed."""
    text = text_model(model)
    parameters = dict(text.named_parameters())
    head = model.get_output_embeddings()
    if head is not None and head.weight is not text.embed_tokens.weight:
        parameters["lm_head.weight"] = head.weight
    return parameters


@contextmanager
def swapped(parameters: Mapping[str, nn.Parameter], weights: Mapping[str, Tensor]) -> Iterator[None]:
    """The model with `weights` (role → tensor) in the place of its own, in its dtype, inside the context.

    On exit the parameters have the very memory they had before, also after an exception. Raises AlignmentError where
    the model has no parameter of a role and its shape.
    """
    before: dict[str, Tensor] = {}
    for role, weight in weights.items():
        parameter, stored = parameters.get(role), tuple(weight.shape)
        if parameter is None or tuple(parameter.shape) != stored:
            held = "has none" if parameter is None else f"holds it as {tuple(parameter.shape)}"
            raise AlignmentError(
                f"{role}: stored as {stored}, and the loaded model {held}; its weights cannot be exchanged in memory"
            )
        before[role] = parameter.data
    try:
        for role, old in before.items():
            parameters[role].data = weights[role].detach().to(old.device, old.dtype)
        yield
    finally:
        for role, old in before.items():
            parameters[role].data = old


class StoredWeights(Mapping[str, Tensor]):
    """Role → tensor of a checkpoint's text model, read from disk when asked for; close it, or use it in `with`."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.names = {held.role: name for name, held in text_view(checkpoint).held.items()}
        self._reader = Reader(checkpoint)

    def __getitem__(self, role: str) -> Tensor:
        return self._reader.tensor(self.names[role])

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)

    def __enter__(self) -> StoredWeights:
        return self

    def __exit__(self, *_: object) -> None:
        self._reader.__exit__(None, None, None)
