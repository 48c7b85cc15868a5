"""Knocking out a block does what its mode says to that block, nothing to the rest, and leaves no trace."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from analysis_tools import bits, same_bits

from vlmgraft.analysis.in_memory import StoredWeights, swapped, text_parameters
from vlmgraft.analysis.layer_knockout import MODES, PARTS, Blocks, Mode, Part
from vlmgraft.checkpoint.index import open_checkpoint
from vlmgraft.errors import RecipeError
from vlmgraft.hf.batches import Question, encode
from vlmgraft.hf.modules import text_model

PROMPTS = [Question(text) for text in ("copy 1 2 3", "copy 4", "what is 3 + 4 ?")]


@pytest.fixture(scope="module")
def merged(vlm_model: Any) -> Any:
    """The VLM with noise on every text parameter, in place of a merge."""
    generator = torch.Generator().manual_seed(0)
    parameters = text_parameters(vlm_model)
    noisy = {r: p.data + 0.01 * torch.randn(p.shape, generator=generator) for r, p in parameters.items()}
    with swapped(parameters, noisy):
        yield vlm_model


@pytest.fixture
def blocks(merged: Any, trio: Path) -> Any:
    with StoredWeights(open_checkpoint(trio / "vlm")) as stored:
        yield Blocks(merged, stored)


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("mode", MODES)
def test_bit_identical_afterwards(blocks: Blocks, processor: Any, mode: Mode, fails: bool) -> None:
    before = bits(blocks.model)
    means = blocks.means(processor, PROMPTS) if mode == "mean" else None
    hooks = [dict(module._forward_hooks) for module in blocks.model.modules()]
    ids = torch.arange(10, 18)[None]
    intact = blocks.model(input_ids=ids).logits
    for part in PARTS:
        try:
            with blocks.knocked_out(2, part, mode, means):
                assert not torch.equal(blocks.model(input_ids=ids).logits, intact)
                if fails:
                    raise KeyboardInterrupt
        except KeyboardInterrupt:
            pass
        assert same_bits(blocks.model, before)
        assert hooks == [dict(module._forward_hooks) for module in blocks.model.modules()]
        assert torch.equal(blocks.model(input_ids=ids).logits, intact)


@pytest.mark.parametrize(("mode", "value"), [("constant", None), ("zero", 0.0)])
@pytest.mark.parametrize("part", PARTS)
def test_projections_become_the_constant(blocks: Blocks, mode: Mode, value: float | None, part: Part) -> None:
    before = {role: one.data.clone() for role, one in blocks.parameters.items()}
    inside = [name for name in ("self_attn", "mlp") if part in ("both", "attention" if name == "self_attn" else name)]
    with blocks.knocked_out(1, part, mode):
        for role, one in blocks.parameters.items():
            if one.ndim == 2 and any(f"layers.1.{name}." in role for name in inside):
                wanted = 1 / one.shape[0] if value is None else value
                assert torch.equal(one.data, torch.full_like(one, wanted)), role
            else:
                assert torch.equal(one.data, before[role]), role


def test_a_zeroed_layer_passes_its_input_on(blocks: Blocks) -> None:
    layer, got = text_model(blocks.model).layers[3], {}

    def keep(module: Any, inputs: Any, kwargs: Any, output: Any) -> None:
        got["in"] = inputs[0] if inputs else kwargs["hidden_states"]
        got["out"] = output[0] if isinstance(output, tuple) else output

    handle = layer.register_forward_hook(keep, with_kwargs=True)
    with blocks.knocked_out(3, "both", "zero"):
        blocks.model(input_ids=torch.arange(10, 18)[None])
    handle.remove()
    assert torch.equal(got["in"], got["out"])


def test_restore_and_only_share_the_model_out(blocks: Blocks, trio: Path) -> None:
    merged = {role: one.data.clone() for role, one in blocks.parameters.items()}
    vlm = {role: one.float() for role, one in (blocks.vlm or {}).items()}
    inside = {role for role in merged if role.startswith("layers.2.mlp.")}
    for mode, block, rest in (("restore", vlm, merged), ("only", merged, vlm)):
        with blocks.knocked_out(2, "mlp", mode):
            for role, one in blocks.parameters.items():
                assert torch.equal(one.data, (block if role in inside else rest)[role]), (mode, role)


def test_means_are_over_the_tokens_without_padding(blocks: Blocks, processor: Any) -> None:
    """Prompts of different lengths in one batch, against one at a time; and the mean is what comes out."""
    means = blocks.means(processor, PROMPTS, batch_size=3)
    outputs: list[torch.Tensor] = []
    module = blocks.module((1, "mlp"))
    handle = module.register_forward_hook(lambda m, i, output: outputs.append(output))
    with torch.no_grad():
        for prompt in PROMPTS:
            blocks.model(**encode(processor, [prompt]))
    handle.remove()
    naive = torch.cat([one[0] for one in outputs]).mean(0)
    torch.testing.assert_close(means[1, "mlp"], naive, rtol=1e-4, atol=1e-5)
    got: list[torch.Tensor] = []
    with blocks.knocked_out(1, "mlp", "mean", means), torch.no_grad():
        handle = module.register_forward_hook(lambda m, i, output: got.append(output))
        blocks.model(input_ids=torch.arange(10, 18)[None])
        handle.remove()
    torch.testing.assert_close(got[0], means[1, "mlp"].expand(1, 8, -1))


@pytest.mark.parametrize(
    ("cell", "message"),
    [
        ((4, "mlp", "zero"), "layers 0 to 3"),
        ((0, "head", "zero"), "parts are"),
        ((0, "mlp", "noise"), "modes are"),
        ((0, "mlp", "restore"), "name the VLM"),
        ((0, "mlp", "mean"), "needs the blocks' means"),
    ],
)
def test_what_cannot_be_meant_is_refused(vlm_model: Any, cell: Any, message: str) -> None:
    with pytest.raises(RecipeError, match=message), Blocks(vlm_model).knocked_out(*cell):
        raise AssertionError("must not be entered")


def test_a_small_model_is_averaged_with_one_thread(blocks: Blocks, processor: Any, threads_seen: list[int]) -> None:
    blocks.means(processor, PROMPTS)
    assert set(threads_seen) == {1}
