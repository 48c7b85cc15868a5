"""The cost model: sizes are those of the models, formulas those of what runs, and the page is what the code says."""

from __future__ import annotations

import importlib.util
import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from vlmgraft.costs.cost import (
    Work,
    answering,
    budget_batches,
    forward,
    gate_step,
    gated_forward,
    stages,
)
from vlmgraft.costs.device import A100, H100
from vlmgraft.costs.models import MODELS, Model
from vlmgraft.distillation.gated_layers import gated
from vlmgraft.distillation.memory import Shapes
from vlmgraft.spectral.svd import matrix_cost

ROOT = Path(__file__).parents[2]
BY_NAME = {model.name: model for model in MODELS}


def tool(path: Path) -> Any:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def config_of(name: str) -> Any:
    """The published sizes as a transformers config."""
    import transformers as T

    if name == "Qwen3-VL-30B-A3B":
        text: dict[str, Any] = {"hidden_size": 2048, "intermediate_size": 6144, "num_hidden_layers": 48}
        text |= {"num_attention_heads": 32, "num_key_value_heads": 4, "head_dim": 128, "num_experts": 128}
        text |= {"num_experts_per_tok": 8, "moe_intermediate_size": 768, "vocab_size": 151936, "decoder_sparse_step": 1}
        vision: dict[str, Any] = {"depth": 27, "hidden_size": 1152, "intermediate_size": 4304, "num_heads": 16}
        vision |= {"out_hidden_size": 2048, "deepstack_visual_indexes": [8, 16, 24], "num_position_embeddings": 2304}
        return T.Qwen3VLMoeConfig(text_config=text, vision_config=vision, tie_word_embeddings=False)
    hidden, inner, layers, heads, keys, words, tower = {
        "Qwen2.5-VL-3B": (2048, 11008, 36, 16, 2, 151936, 3420),
        "Qwen2.5-VL-7B": (3584, 18944, 28, 28, 4, 152064, 3420),
        "Qwen2.5-VL-32B": (5120, 27648, 64, 40, 8, 152064, 3456),
        "Qwen2.5-VL-72B": (8192, 29568, 80, 64, 8, 152064, 3456),
    }[name]
    text = {"hidden_size": hidden, "intermediate_size": inner, "num_hidden_layers": layers, "vocab_size": words}
    text |= {"num_attention_heads": heads, "num_key_value_heads": keys, "tie_word_embeddings": name.endswith("3B")}
    vision = {"depth": 32, "hidden_size": 1280, "intermediate_size": tower, "num_heads": 16, "out_hidden_size": hidden}
    return T.Qwen2_5_VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=name.endswith("3B"))


def test_donor_matching_adds_a_batch_of_text_to_every_step() -> None:
    model, plain = BY_NAME["Qwen2.5-VL-3B"], Work(rank=128, steps=50, checkpointing=False)
    told = replace(plain, matched=20, text_prompt=30, text_answer=70)
    before, after = ({stage.name: stage for stage in stages(model, work)} for work in (plain, told))
    step = gate_step(model.shapes, 16 * 100, 100, 16 * 70, rank=128)
    assert after["gates"].operations - before["gates"].operations == pytest.approx(50 * step)
    ratio = after["gates"].seconds / before["gates"].seconds
    assert ratio == pytest.approx(after["gates"].operations / before["gates"].operations)
    answers, seconds = answering(model, H100, 20, 30, 70, told.answered)
    assert after["teacher"].operations - before["teacher"].operations == pytest.approx(answers)
    assert after["teacher"].seconds - before["teacher"].seconds == pytest.approx(seconds)


@pytest.mark.slow
@pytest.mark.parametrize("name", BY_NAME)
def test_sizes_are_those_of_the_model(name: str) -> None:
    assert Model.of(name, config_of(name)) == BY_NAME[name]


@pytest.mark.parametrize("size", ["3b", "7b", "32b"])
def test_parameters_are_the_published_ones(size: str) -> None:
    replica = json.loads((ROOT / "tests" / "replicas" / f"qwen2.5-vl-{size}.json").read_text())
    assert BY_NAME[f"Qwen2.5-VL-{size.upper()}"].parameters == replica["parameters"]


def test_the_page_is_what_the_code_says() -> None:
    """After a change: `python docs/tools/scale_tables.py`."""
    tables = tool(ROOT / "docs" / "tools" / "scale_tables.py")
    page = (ROOT / "docs" / "scale.md").read_text()
    assert page.count("<!-- end -->") == len(tables.TABLES)
    assert tables.fill(page) == page


def test_operations_are_those_that_torch_counts(trio: Path) -> None:
    """A training step on the lab's VLM, rebuilt backend: the counter passes over the products in place of the other."""
    from vlmgraft.hf.models import load_vlm
    from vlmgraft.hf.modules import match_projections, text_linears, text_model
    from vlmgraft.spectral.factors import Factors

    model = load_vlm(trio / "vlm", "float32").requires_grad_(False)
    model.set_attn_implementation("eager")  # whether the counter knows a fused kernel depends on torch's release
    factors = {}
    for role, one in text_linears(model).items():
        out, inner = one.weight.shape
        r = min(out, inner)
        factors[role] = Factors(role, role, torch.randn(out, r), torch.ones(r), torch.randn(r, inner), 1.0, 0.0)
    x = torch.randn(2, 32, text_model(model).embed_tokens.weight.shape[1])
    with gated(model, match_projections(model, factors), factors, "rebuilt") as layers:
        layers.set({name: torch.ones(len(one.s), requires_grad=True) for name, one in factors.items()})
        with FlopCounterMode(display=False) as counter:
            hidden = text_model(model)(inputs_embeds=x, use_cache=False).last_hidden_state
            model.lm_head(hidden[0, :10]).square().mean().backward()
    expected = gate_step(Shapes.of(model.config), 64, 32, 10, backend="rebuilt")
    assert counter.get_total_flops() == pytest.approx(expected, rel=0.05)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model.lm_head(text_model(model)(inputs_embeds=x, use_cache=False).last_hidden_state)
    assert counter.get_total_flops() == forward(Model("lab", Shapes.of(model.config), 0, 0), 64, 32, 64)


@pytest.mark.parametrize("model", MODELS, ids=lambda model: model.name)
def test_what_stages_share_and_scale_with(model: Model) -> None:
    full, low, many = (
        {one.name: one for one in stages(model, work)} for work in (Work(), Work(rank=256), Work(gpus=8))
    )
    slow = {one.name: one for one in stages(model, Work(), A100)}
    assert full["merge"].written == full["fold"].written == 2 * model.parameters
    assert low["decompose"].written < full["decompose"].written
    assert full["decompose"].operations == sum(n * matrix_cost((out, inner)) for n, out, inner in model.matrices)
    assert many["gates"].memory < full["gates"].memory and many["gates"].seconds == full["gates"].seconds
    assert many["gates"].operations == 8 * full["gates"].operations  # a batch on each GPU
    assert many["teacher"].memory < full["teacher"].memory > 2 * model.parameters
    assert all(slow[name].seconds >= one.seconds for name, one in full.items())
    assert model.active == model.merged or model.shapes.experts
    assert H100.bf16 > A100.bf16


@pytest.mark.parametrize("size", ["3b-smallthinker", "7b-r1-distill", "32b-qwq"])
def test_the_folds_memory_is_that_of_the_plan(size: str) -> None:
    """The recipes carry the plan that headers of the real names and shapes gave."""
    text = (ROOT / "recipes" / f"frism-qwen2.5-vl-{size}.yaml").read_text()
    planned = re.search(r"(\d+) MB of memory \(the fold alone\)", text)
    assert planned is not None
    model = BY_NAME[f"Qwen2.5-VL-{size.partition('-')[0].upper()}"]
    fold = next(one for one in stages(model, Work()) if one.name == "fold")
    assert fold.memory / 1e6 == pytest.approx(int(planned[1]), rel=0.05)


def test_the_measurements_are_near_the_predictions() -> None:
    """What the page prints, as it was measured: bytes within 2 %, operations within 12 %."""
    rows = json.loads((ROOT / "benchmarks" / "results" / "scale.json").read_text())
    for row in rows:
        ratio = row["predicted"] / row["measured"]
        if row["unit"] == "bytes":
            assert ratio == pytest.approx(1, abs=0.02), row
        if row["unit"] == "operations":
            assert ratio == pytest.approx(1, abs=0.12), row


def test_a_budget_costs_its_forward_passes() -> None:
    """128 held-out questions in 16 batches: all at the start and three times at the end, four of them every twelfth of
    200 steps after the first."""
    assert budget_batches(128, 8, 200, 12) == 16 * 4 + 4 * 16
    assert budget_batches(20, 8, 4, 4) == 3 * 4, "fewer than a part's 32: all of them, and no second observation"
    without, with_one = ({stage.name: stage for stage in stages(BY_NAME["Qwen2.5-VL-7B"], Work(budget=budget))}
                         for budget in (False, True))  # fmt: skip
    shapes = BY_NAME["Qwen2.5-VL-7B"].shapes
    passes = gated_forward(shapes, 8 * 1064, 1064) + 2.0 * shapes.hidden * shapes.vocabulary * 8 * 64
    assert with_one["gates"].operations - without["gates"].operations == pytest.approx(passes * (16 * 4 + 4 * 16))
    assert with_one["teacher"] == without["teacher"]


def test_offloaded_layers_take_their_way_over_the_link() -> None:
    """640 questions of 64 tokens, 32 at a time: 20 · 65 passes, and 80 batches of targets; 200 steps forward and
    backward; 32 GB/s, of which three quarters are reached."""
    model = BY_NAME["Qwen2.5-VL-32B"]
    here, there = ({stage.name: stage for stage in stages(model, Work(rank=64, offload=offload), A100)}
                   for offload in (False, True))  # fmt: skip
    layers = 2 * 64 * 487_605_248
    assert there["teacher"].seconds - here["teacher"].seconds == pytest.approx((20 * 65 + 80) * layers / 24e9)
    whole = layers + 2 * model.factors(64)
    assert there["gates"].seconds - here["gates"].seconds == pytest.approx(400 * whole / 24e9)
    assert there["teacher"].memory < here["teacher"].memory - 0.95 * layers
    two = {stage.name: stage for stage in stages(model, Work(rank=64, offload=True, gpus=2), A100)}
    plain = {stage.name: stage for stage in stages(model, Work(rank=64, gpus=2), A100)}
    assert two["gates"].seconds - plain["gates"].seconds == pytest.approx(200 * whole / 24e9), "each copies its half"
