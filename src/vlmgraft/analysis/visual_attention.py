"""Visual attention of each decoder layer: the share of attention that text tokens give to visual tokens.

FRANK (arXiv 2505.16151) fits its prior to these shares. For every text token after an image token (earlier tokens
cannot see it), the attention weights on visual tokens are summed, then averaged over heads, tokens and prompts. The
paper does not say which text tokens count; this is our choice.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vlmgraft.analysis.eval_data import as_questions, open_vlm
from vlmgraft.data.sources import registered_source
from vlmgraft.distillation.prompts import placeholders
from vlmgraft.errors import AlignmentError, DataError
from vlmgraft.evaluation.readers import load_suite
from vlmgraft.hf.batches import Progress, Question, batches, encode, load_questions, to_device
from vlmgraft.hf.modules import text_model
from vlmgraft.hf.placement import threads_of
from vlmgraft.storage.resources import out_of_memory


def attention(
    model: str | Path,
    data: str | Path = "lab",
    *,
    samples: int = 64,
    batch_size: int = 4,
    progress: Progress | None = None,
) -> tuple[float, ...]:
    """The share of attention that text gives to visual tokens, one number in [0, 1] per decoder layer, for FRANK.

    Args:
        data: a question file with images, answers are not read; or a registered source with a split "calibration".
        samples: at most this many questions.
    Raises:
        DataError, CheckpointError, AlignmentError: from loading or measuring.
    """
    if registered_source(data):
        prompts = as_questions(load_suite(data, split="calibration", limit=samples), samples)
    else:
        prompts = load_questions(data, need_images=True, limit=samples)
    loaded, processor = open_vlm(model)
    return visual_attention(loaded, processor, prompts, batch_size=batch_size, progress=progress)


@torch.no_grad()
def visual_attention(
    model: Any, processor: Any, questions: Sequence[Question], *, batch_size: int = 4, progress: Progress | None = None
) -> tuple[float, ...]:
    """One share per decoder layer, each in [0, 1]; holds one layer's weights [batch, heads, length, length] at a time.

    Raises:
        DataError: there are no questions with images, or their prompts hold no visual tokens (a model with
            cross-attention to images). AlignmentError: the model's layers do not return attention weights.
    """
    prompts = [question for question in questions if question.images]
    if not prompts:
        raise DataError("attention: none of the questions has an image; give questions with images")
    image_tokens = torch.tensor(sorted(placeholders(model)))
    sums = torch.zeros(len(text_model(model).layers), dtype=torch.float64)
    count = done = 0
    for group in batches(prompts, batch_size):
        batch = to_device(encode(processor, [prompts[index] for index in group]), model.device, model.dtype)
        keep = batch["attention_mask"].bool()
        visual = torch.isin(batch["input_ids"], image_tokens.to(model.device)) & keep
        text = keep & ~visual & (visual.cumsum(1) > 0)
        if not visual.any(1).all():
            raise DataError(f"{type(model).__name__}: a prompt with an image has no visual tokens to attend to")

        def add(layer: int, weights: Tensor, visual: Tensor = visual, text: Tensor = text) -> None:
            share = (weights.float().mean(1) * visual[:, None]).sum(-1)
            sums[layer] += float(share[text].double().sum())

        with threads_of(model), _weights(model, add), out_of_memory("reading attention weights", "lower batch_size"):
            model(**batch, use_cache=False)
        count, done = count + int(text.sum()), done + len(group)
        if progress is not None:
            progress(done, len(prompts), "attention")
    return tuple((sums / count).tolist())


@contextmanager
def _weights(model: Any, use: Callable[[int, Tensor], None]) -> Iterator[None]:
    """Pass every layer's attention weights to `use` while the model runs with transformers' eager attention; on exit
    the model is as before."""
    decoder = text_model(model)

    def record(index: int, module: Any, args: Any, output: Any) -> None:
        if not isinstance(output, tuple) or len(output) < 2 or output[1] is None:
            raise AlignmentError(f"{type(module).__name__} of layer {index}: hands out no attention weights")
        use(index, output[1])

    with ExitStack() as stack:
        for index, layer in enumerate(decoder.layers):
            if not hasattr(layer, "self_attn"):
                raise AlignmentError(f"{type(layer).__name__} of layer {index}: has no self_attn to look into")
            stack.enter_context(layer.self_attn.register_forward_hook(partial(record, index)))
        stack.callback(setattr, decoder.config, "_attn_implementation", decoder.config._attn_implementation)
        decoder.config._attn_implementation = "eager"
        yield
