"""Image features of a frozen vision tower, kept so that the tower runs once for each image.

The features of a question's images are recorded while the question is answered: from the text model's inputs, at the
image placeholders (and beside them, for Qwen3-VL, its deeper features). When the question is captured later, in a batch
with any other questions, the features replace tower and projector: `get_image_features` of transformers' models returns
them. The text model's inputs are then compared with the recorded ones; a model in which they differ runs its tower
again.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import wraps
from typing import Any

import torch
from torch import Tensor
from transformers.modeling_outputs import BaseModelOutputWithPooling

from vlmgraft.hf.modules import text_model

DEEPER = "deepstack_visual_embeds"
COUNTS, LISTS, PART = "image_counts", "image_lists", "image_part"
Rows = tuple[Tensor, ...]
"""A question's features on the CPU: [tokens, hidden] at its placeholders, and the same for Qwen3-VL's first layers."""


class ImageFeatures:
    """Features by question number; none for models without `get_image_features`, whose tower runs every time.

    placeholders: token ids that stand for images.
    """

    def __init__(self, model: Any, placeholders: Collection[int]) -> None:
        self.model, self.placeholders = model, torch.tensor(sorted(placeholders))
        encoders = [module for module in model.modules() if hasattr(module, "get_image_features")]
        self.encoder: Any = encoders[-1] if encoders else None  # outer modules delegate to it
        self.rows: dict[int, Rows] = {}
        self.lists = (False, False)

    @contextmanager
    def recorded(self) -> Iterator[dict[str, Tensor]]:
        """Inside the context a batch of questions is answered; the yielded dictionary holds its features afterwards,
        for `keep`, or nothing if the batch has no images."""
        ids, lists, found = list[Tensor | None](), list[Tensor](), dict[str, Tensor]()

        def read(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            ids.append(kwargs.get("input_ids"))

        def given(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            prompt = ids[0] if len(ids) == 1 and lists else None  # the pass over the prompt, not those after it
            rows = [] if prompt is None else self._rows(prompt, kwargs)
            if rows:
                found[COUNTS], found[LISTS] = torch.tensor([len(row[0]) for row in rows]), lists[0]
                parts = enumerate(zip(*rows, strict=True))
                found.update({f"{PART}_{number:03d}": torch.cat(part) for number, part in parts})

        def noted(ordinary: Callable[[], Any]) -> Any:
            output = ordinary()
            pooled, deeper = getattr(output, "pooler_output", None), getattr(output, "deepstack_features", None)
            if pooled is not None:  # in one tensor, or in a list of them
                lists.append(torch.tensor([isinstance(one, list | tuple) for one in (pooled, (deeper or [None])[0])]))
            return output

        of_model, of_text = (
            module.register_forward_pre_hook(hook, with_kwargs=True, prepend=True)
            for module, hook in ((self.model, read), (text_model(self.model), given))
        )
        with of_model, of_text, self._encoding(noted):
            yield found

    def keep(self, numbers: Sequence[int], found: Mapping[str, Tensor]) -> None:
        """Keep the features recorded for these questions, if there are any."""
        if COUNTS not in found or self.encoder is None:
            return
        counts, self.lists = found[COUNTS].tolist(), (bool(found[LISTS][0]), bool(found[LISTS][1]))
        names = sorted(name for name in found if name.startswith(PART))
        parts = [[row.clone() for row in found[name].cpu().split(counts)] for name in names]  # freed one by one
        self.rows.update(zip(numbers, zip(*parts, strict=True), strict=True))

    def stand_for(self, numbers: Sequence[int], inputs: Mapping[str, Any]) -> bool:
        """Whether features of all these questions' images are kept, as many as `inputs` have placeholders."""
        counts = torch.isin(inputs["input_ids"], self.placeholders).sum(1).tolist()
        return counts == [len(self.rows[number][0]) for number in numbers if number in self.rows]

    @contextmanager
    def recalled(self, numbers: Sequence[int]) -> Iterator[None]:
        """Inside the context one batch of these questions is read, any number of times: with the kept features, or else
        with one run of the tower."""
        kept: list[Any] = [self._joined(numbers)] if self.rows.keys() >= set(numbers) else []

        def once(ordinary: Callable[[], Any]) -> Any:
            if not kept:
                kept.append(ordinary())
            return kept[0]

        with self._encoding(once):
            yield

    def agree(self, numbers: Sequence[int], ids: Tensor, given: Mapping[str, Any]) -> bool:
        """Whether the text model's inputs in this batch equal the kept features and hold no NaN of replaced pixels
        (`without_pixels`). These features are freed in any case; if they differ, all are dropped and none are kept any
        more."""
        known = [self.rows.pop(number) for number in numbers if number in self.rows]
        same = len(known) < len(numbers) or [*map(_bits, self._rows(ids, given))] == [*map(_bits, known)]
        same = same and not (known and given["inputs_embeds"].isnan().any())
        if not same:
            self.rows.clear()
            self.encoder = None
        return same

    @contextmanager
    def _encoding(self, encode: Callable[[Callable[[], Any]], Any]) -> Iterator[None]:
        """Inside the context `encode` provides the features; it is given the function that would compute them."""
        if self.encoder is None:
            yield
            return
        encoder, ordinary = self.encoder, self.encoder.get_image_features
        own = vars(encoder).get("get_image_features")  # set on the instance, in place of the class's method

        @wraps(ordinary)  # transformers inspects the arguments' names
        def answered(*args: Any, **kwargs: Any) -> Any:
            return encode(lambda: ordinary(*args, **kwargs))

        encoder.get_image_features = answered
        try:
            yield
        finally:
            del encoder.get_image_features
            if own is not None:
                encoder.get_image_features = own

    def _rows(self, ids: Tensor, given: Mapping[str, Any]) -> list[Rows]:
        """The features of every row of a batch; [] if they are not at the placeholders."""
        embeds = given.get("inputs_embeds")
        at = torch.isin(ids, self.placeholders.to(ids.device))
        if embeds is None or at.shape != embeds.shape[:2]:
            return []
        counts, parts = at.sum(1).tolist(), [embeds[at.to(embeds.device)], *(given.get(DEEPER) or ())]
        if any(len(part) != sum(counts) for part in parts):
            return []
        return list(zip(*(part.cpu().split(counts) for part in parts), strict=True))

    def _joined(self, numbers: Sequence[int]) -> Any:
        """The features of these questions' images in the form that the model returns them."""
        parts = [
            torch.cat(part).to(self.model.device) for part in zip(*map(self.rows.__getitem__, numbers), strict=True)
        ]
        pooled, *deeper = parts
        lists, deep_lists = self.lists
        output: Any = BaseModelOutputWithPooling(pooler_output=(pooled,) if lists else pooled)
        output.deepstack_features = [(part,) if deep_lists else part for part in deeper]
        return output


def without_pixels(inputs: Mapping[str, Any]) -> dict[str, Any]:
    """Inputs with NaN in place of pixels, for batches with kept features: any other use of the pixels gives NaN."""
    return {
        key: torch.full_like(value, torch.nan) if isinstance(value, Tensor) and value.is_floating_point() else value
        for key, value in inputs.items()
    }


def _bits(rows: Rows) -> list[bytes]:
    return [row.contiguous().view(torch.uint8).numpy().tobytes() for row in rows]
