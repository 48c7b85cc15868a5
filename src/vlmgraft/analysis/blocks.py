"""The attention and feed-forward blocks of a model's decoder layers: knocking one out, and putting it back.

| mode     | what the block becomes                                                                          |
|----------|-------------------------------------------------------------------------------------------------|
| constant | every entry of its projections is 1/d_out, as the code of Bring Reason to Vision (2505.05464) has it |
| zero     | every entry of its projections is 0: the layer passes its input on                              |
| mean     | its output is its own mean over prompts, at every position (mean ablation)                      |
| restore  | its weights are the VLM's: this block un-merged                                                 |
| only     | its weights are the merged ones, and those of everything else are the VLM's                     |

Biases and norms stay as they are in the first two. d_out is the number of rows of a projection.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor, nn

from vlmgraft.alignment.view import group_of
from vlmgraft.analysis.swap import swapped, text_parameters
from vlmgraft.errors import AlignmentError, RecipeError
from vlmgraft.hf.batches import Question, batches, encode, to_device
from vlmgraft.hf.modules import text_model

Part = Literal["attention", "mlp", "both"]
Mode = Literal["constant", "zero", "mean", "restore", "only"]
PARTS: tuple[Part, ...] = get_args(Part)
MODES: tuple[Mode, ...] = get_args(Mode)
NEED_VLM: tuple[Mode, ...] = ("restore", "only")

Block = tuple[int, str]
"""Layer and "attention" or "mlp"."""
Means = Mapping[Block, Float[Tensor, " hidden"]]


class Blocks:
    """The blocks of one model in memory. vlm: the VLM's weights by role, for the modes that put them back."""

    def __init__(self, model: Any, vlm: Mapping[str, Tensor] | None = None) -> None:
        self.model, self.vlm = model, vlm
        self.parameters = text_parameters(model)
        self.depth = len(text_model(model).layers)

    @contextmanager
    def knocked_out(self, layer: int, part: Part, mode: Mode, means: Means | None = None) -> Iterator[None]:
        """The model with one block, or both of a layer, changed; bit for bit as before on exit, whatever happens.

        Raises:
            RecipeError: no such layer, part or mode, or the mode needs the VLM's weights or means that are not given.
        """
        self._check(layer, part, mode, means)
        blocks = [(layer, name) for name in PARTS[:2] if part in (name, "both")]
        with ExitStack() as stack:
            if mode == "mean":
                for block in blocks:
                    stack.enter_context(self._averaged(block, (means or {})[block]))
            else:
                stack.enter_context(swapped(self.parameters, self._weights(blocks, mode)))
            yield

    def _check(self, layer: int, part: Part, mode: Mode, means: Means | None) -> None:
        if not 0 <= layer < self.depth:
            raise RecipeError(f"layer {layer}: the model has layers 0 to {self.depth - 1}")
        if part not in PARTS or mode not in MODES:
            raise RecipeError(f"{part} {mode}: parts are {', '.join(PARTS)}; modes are {', '.join(MODES)}")
        if mode in NEED_VLM and self.vlm is None:
            raise RecipeError(f"mode {mode} puts weights of the VLM back: name the VLM that the model was merged from")
        if mode == "mean" and means is None:
            raise RecipeError("mode mean needs the blocks' means over prompts, see `block_means`")

    def _weights(self, blocks: Sequence[Block], mode: Mode) -> dict[str, Tensor]:
        if mode in ("constant", "zero"):
            inside = {role: weight.data for block in blocks for role, weight in self._projections(block).items()}
            fill = {role: 1 / weight.shape[-2] if mode == "constant" else 0.0 for role, weight in inside.items()}
            return {role: torch.full_like(weight, fill[role]) for role, weight in inside.items()}
        vlm = self.vlm or {}
        merged = {role for layer, name in blocks for role in self.parameters if role.startswith(_inside(layer, name))}
        if mode == "restore":
            return {role: vlm[role] for role in self.parameters if role in merged and role in vlm}
        return {role: vlm[role] for role in self.parameters if role not in merged and role in vlm}

    def _projections(self, block: Block) -> dict[str, nn.Parameter]:
        """The matrices of a block, without norms, biases and routers."""
        layer, name = block
        matrices = {
            role: weight
            for role, weight in self.parameters.items()
            if role.startswith(f"layers.{layer}.") and group_of(role) == name and weight.ndim > 1
        }
        if not matrices:
            raise AlignmentError(f"layer {layer} of {type(self.model).__name__}: no projection is recognised as {name}")
        return matrices

    @contextmanager
    def _averaged(self, block: Block, mean: Float[Tensor, " hidden"]) -> Iterator[None]:
        def replace(module: nn.Module, inputs: Any, output: Any) -> Any:
            first = output[0] if isinstance(output, tuple) else output
            flat = mean.to(first).expand_as(first)
            return (flat, *output[1:]) if isinstance(output, tuple) else flat

        handle = self.module(block).register_forward_hook(replace)
        try:
            yield
        finally:
            handle.remove()

    def module(self, block: Block) -> nn.Module:
        """The module of a block."""
        return text_model(self.model).get_submodule(_inside(*block).rstrip("."))

    @torch.no_grad()
    def means(self, processor: Any, prompts: Sequence[Question], batch_size: int = 16) -> dict[Block, Tensor]:
        """The mean output of every block over the tokens of prompts, padding left out, float32 [hidden].

        Raises:
            AlignmentError: the model's sequence is not the processor's, so that padding cannot be told apart.
        """
        sums: dict[Block, Tensor] = {}
        tokens = 0
        mask = torch.empty(0, 0, dtype=torch.bool)

        def collect(block: Block, module: nn.Module, inputs: Any, output: Any) -> None:
            first = output[0] if isinstance(output, tuple) else output
            if first.shape[:2] != mask.shape:
                raise AlignmentError(
                    f"{type(self.model).__name__}: {tuple(mask.shape)} tokens went in, layers see "
                    f"{tuple(first.shape[:2])}; mode mean cannot tell padding apart, leave it out"
                )
            sums[block] = sums.get(block, 0) + first[mask].float().sum(0)

        with ExitStack() as stack:
            for block in [(layer, name) for layer in range(self.depth) for name in PARTS[:2]]:
                stack.callback(self.module(block).register_forward_hook(partial(collect, block)).remove)
            for indices in batches(prompts, batch_size):
                batch = encode(processor, [prompts[index] for index in indices])
                inputs = to_device(batch, self.model.device, self.model.dtype)
                mask = inputs["attention_mask"].bool()
                tokens += int(mask.sum())
                self.model(**inputs)
        return {block: total / tokens for block, total in sums.items()}


def _inside(layer: int, name: str) -> str:
    return f"layers.{layer}.{'self_attn' if name == 'attention' else 'mlp'}."
