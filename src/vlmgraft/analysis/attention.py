"""How much each decoder layer looks at the image: the share of attention that text gives to visual tokens.

FRANK (arXiv 2505.16151) fits its prior to these shares. Of every text token that comes after an image token (those
before cannot see it), the attention weights on visual tokens are summed, averaged over heads, and then over tokens and
prompts. Which text tokens count, the paper does not say: our choice.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from vlmgraft.errors import AlignmentError, DataError
from vlmgraft.hf.data import Progress, Question, batches, encode, to_device
from vlmgraft.hf.models import text_model
from vlmgraft.resources import out_of_memory
from vlmgraft.training.teacher import placeholders


@torch.no_grad()
def visual_attention(
    model: Any,
    processor: Any,
    questions: Sequence[Question],
    *,
    batch_size: int = 4,
    progress: Progress | None = None,
) -> tuple[float, ...]:
    """One share per decoder layer, each in [0, 1]; holds one layer's weights [batch, heads, length, length] at a time.

    Raises:
        DataError: there are no questions with images, or their prompts hold no visual tokens (a model that looks at
            images through cross-attention). AlignmentError: the model's layers do not hand out their weights.
    """
    asked = [question for question in questions if question.images]
    if not asked:
        raise DataError("attention: none of the questions has an image; give questions with images")
    stand_ins = torch.tensor(sorted(placeholders(model)))
    sums = torch.zeros(len(text_model(model).layers), dtype=torch.float64)
    count = done = 0
    for group in batches(asked, batch_size):
        batch = to_device(encode(processor, [asked[index] for index in group]), model.device, model.dtype)
        keep = batch["attention_mask"].bool()
        visual = torch.isin(batch["input_ids"], stand_ins.to(model.device)) & keep
        text = keep & ~visual & (visual.cumsum(1) > 0)
        if not visual.any(1).all():
            raise DataError(f"{type(model).__name__}: a prompt with an image has no visual tokens to attend to")

        def add(layer: int, weights: Tensor, visual: Tensor = visual, text: Tensor = text) -> None:
            share = (weights.float().mean(1) * visual[:, None]).sum(-1)
            sums[layer] += float(share[text].double().sum())

        with _weights(model, add), out_of_memory("reading attention weights", "lower batch_size"):
            model(**batch, use_cache=False)
        count, done = count + int(text.sum()), done + len(group)
        if progress is not None:
            progress(done, len(asked), "attention")
    return tuple((sums / count).tolist())


@contextmanager
def _weights(model: Any, use: Callable[[int, Tensor], None]) -> Iterator[None]:
    """Hand every layer's attention weights to `use` while the model runs, by transformers' plain attention; the model
    is as before on exit."""
    decoder = text_model(model)
    before, handles = decoder.config._attn_implementation, []
    for place, layer in enumerate(decoder.layers):

        def seen(module: Any, args: Any, output: Any, place: int = place) -> None:
            if not isinstance(output, tuple) or len(output) < 2 or output[1] is None:
                raise AlignmentError(f"{type(module).__name__} of layer {place}: hands out no attention weights")
            use(place, output[1])

        if not hasattr(layer, "self_attn"):
            raise AlignmentError(f"{type(layer).__name__} of layer {place}: has no self_attn to look into")
        handles.append(layer.self_attn.register_forward_hook(seen))
    try:
        decoder.config._attn_implementation = "eager"
        yield
    finally:
        decoder.config._attn_implementation = before
        for handle in handles:
            handle.remove()
