"""The compiled pass: torch's weights to the bit, facts as float64 has them, and torch wherever it does not apply."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from hypothesis.extra.numpy import arrays
from merge_builders import KEYS, build, build_experts, bytes_in, save
from safetensors.torch import load_file

from vlmgraft.alignment import Alignment, align
from vlmgraft.checkpoint.handles import as_bytes
from vlmgraft.checkpoint.index import open_checkpoint
from vlmgraft.errors import NumericalError, VlmgraftError, WeightsError
from vlmgraft.merging import merge as merge_module, merge_tensors
from vlmgraft.methods.base import Method, TensorContext
from vlmgraft.methods.dare import DareLinear
from vlmgraft.methods.linear import LayerSwap, Linear
from vlmgraft.methods.task_arithmetic import TaskArithmetic
from vlmgraft.methods.ties import Ties, TrimmedTies

compiled = pytest.importorskip("vlmgraft.merging.compiled")

ALL = (*KEYS, "vlm_base")
LEAST = 2.0**-12
FORMS: dict[str, Method] = {
    "plus": TaskArithmetic(0.7),
    "minus": TaskArithmetic(-1.3),
    "near the donor": Linear(0.3),
    "near the VLM": Linear(0.9),
    "half": Linear(0.5),
    "beyond": Linear(1.4),
    "not a mean": Linear(0.9, 1.1),
    "ties": TrimmedTies(Ties(weights=(1.6, 0.2)), {"": {"vlm": LEAST, "donor": 3 * LEAST}}),
    "ties, all kept": TrimmedTies(Ties(weights=(1.0, -0.5), scale=0.3), {"": {"vlm": 0.0, "donor": 0.0}}),
}


def fields(text: str) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(len(text))
    base = 0.02 * torch.randn(5000, generator=generator)
    return {key: (base + 5e-4 * torch.randn(5000, generator=generator)).bfloat16() for key in ALL}


def both(method: Method, stored: dict[str, torch.Tensor]) -> tuple[Any, torch.Tensor, torch.Tensor, torch.Tensor]:
    """The facts and the result of the compiled pass, torch's result before and after the cast."""
    context, out = TensorContext("", tuple(stored["vlm"].shape), 1), torch.empty_like(stored["vlm"])
    fused = method.fused(context)
    assert fused is not None
    keys = ALL if fused.form == "ties" else KEYS
    facts = compiled.merge_chunk(fused, {key: as_bytes(stored[key]) for key in keys}, as_bytes(out))
    with np.errstate(all="ignore"):
        twin = method.apply({key: tensor.float() for key, tensor in stored.items()}, context)
    return facts, out, twin, twin.bfloat16()


@pytest.mark.parametrize("name", FORMS)
def test_the_facts_are_those_of_float64(name: str) -> None:
    stored = fields(name)
    facts, out, twin, cast = both(FORMS[name], stored)
    assert torch.equal(out.view(torch.int16), cast.view(torch.int16))
    vlm = stored["vlm"].double()
    meant = (twin - stored["vlm"].float()).double()
    written = cast.double() - vlm
    moved = stored["donor"].double() - stored["donor_base"].double()
    assert facts.weight == pytest.approx(float(vlm @ vlm), rel=1e-5)
    assert facts.task_vector == pytest.approx(float(moved @ moved), rel=1e-5)
    assert facts.added == pytest.approx(float(meant @ meant), rel=1e-5)
    assert facts.error == pytest.approx(float((written - meant) @ (written - meant)), rel=1e-4)
    assert facts.along == pytest.approx(float((written - meant) @ meant), rel=1e-3, abs=1e-5 * facts.added)
    assert facts.changed == int((written != 0).sum())


@pytest.mark.parametrize("name", FORMS)
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_any_finite_bits_give_torchs_weights(name: str, data: st.DataObject) -> None:
    """Denormals, zeros of both signs, ties of the rounding, values near the end; of lengths that fill no vector."""
    count = data.draw(st.integers(1, 70))
    finite = st.integers(0, 0x7F7F).flatmap(lambda bits: st.sampled_from([bits, bits | 0x8000]))
    stored = {
        key: torch.from_numpy(data.draw(arrays(np.uint16, count, elements=finite)).view(np.int16)).view(torch.bfloat16)
        for key in ALL
    }
    facts, out, _, cast = both(FORMS[name], stored)
    if facts is not None:
        assert torch.equal(out.view(torch.int16), cast.view(torch.int16))
        assert torch.isfinite(cast.float()).all()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("name", FORMS)
def test_weights_that_are_not_finite_are_left_to_torch(name: str, value: float) -> None:
    for key in ALL if isinstance(FORMS[name], TrimmedTies) else KEYS:
        stored = fields(name)
        stored[key][4321] = value
        assert both(FORMS[name], stored)[0] is None


def test_what_is_trimmed_is_counted() -> None:
    """A tally by hand, equal magnitudes at the threshold among it."""
    one = torch.ones(4)
    stored = {
        "vlm_base": one,
        "donor_base": one,
        "vlm": one + LEAST * torch.tensor([0, 32, -32, 64]),
        "donor": one + LEAST * torch.tensor([0, 32, 96, 128]),
    }
    method = TrimmedTies(Ties(), {"": {"vlm": 32 * LEAST, "donor": 96 * LEAST}}, {})
    both(method, {key: tensor.bfloat16() for key, tensor in stored.items()})
    assert method.tally("") == {"vlm": [1, 3, 4], "donor": [1, 2, 4]}


# --- whole merges ------------------------------------------------------------------------------------------------


def trio(folder: Path) -> Alignment:
    """Four checkpoints; the merged tensors have chunks of all kinds (see merge_builders)."""
    build(folder)
    base = load_file(folder / "donor_base" / "model.safetensors")
    save(folder / "vlm_base", {name: t + 0.01 * torch.randn(t.shape).bfloat16() for name, t in base.items()})
    (folder / "vlm_base" / "config.json").write_text((folder / "donor_base" / "config.json").read_text())
    return align(*(open_checkpoint(folder / key) for key in ALL))


def merged(alignment: Alignment, method: Method, out: Path, at: int, **options: Any) -> tuple[bytes, dict[str, Any]]:
    """The weights' bytes and the receipt; at: elements from which a merge is compiled."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(merge_module, "WORTH_COMPILING", at)
        merge_tensors(alignment, method, out, **options)
    receipt = json.loads((out / "receipt.json").read_text())
    (out / "receipt.json").unlink()
    return bytes_in(out), receipt


@pytest.fixture
def chunks(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The forms of the chunks that were merged by the compiled pass."""
    seen: list[str] = []
    ordinary = compiled.merge_chunk

    def watched(fused: Any, *given: Any) -> Any:
        found = ordinary(fused, *given)
        seen.extend([fused.form] if found is not None else [])
        return found

    monkeypatch.setattr(compiled, "merge_chunk", watched)
    return seen


METHODS: dict[str, tuple[Method, tuple[str, ...]]] = {
    "task arithmetic": (TaskArithmetic(0.7), KEYS),
    "linear": (Linear(0.9), KEYS),
    "linear without a base": (Linear(0.9), KEYS[:2]),
    "ties": (Ties(0.3), ALL),
    "ties by tensor": (Ties(0.3, trim="tensor"), ALL),
}


@pytest.mark.parametrize("name", METHODS)
def test_a_merge_has_torchs_bytes_and_facts(tmp_path: Path, name: str, chunks: list[str]) -> None:
    trio(tmp_path)
    method, keys = METHODS[name]
    alignment = align(*(open_checkpoint(tmp_path / key) for key in keys))
    fast, facts = merged(alignment, method, tmp_path / "fast", 0, threads=2)
    assert chunks
    slow, wanted = merged(alignment, method, tmp_path / "slow", sys.maxsize)
    assert fast == slow
    assert facts["sources"] == wanted["sources"]
    for row, twin in zip(facts["tensors"], wanted["tensors"], strict=True):
        assert row["changed"] == twin["changed"]
        for figure in ("added", "task_vector", "effective", "noise"):
            assert row[figure] == (None if twin[figure] is None else pytest.approx(twin[figure], rel=1e-4))
    assert ("numba" in facts["versions"]) and "numba" not in wanted["versions"]


@pytest.mark.parametrize(
    ("method", "options"),
    [
        (TaskArithmetic(0.7), {"seed": 3}),
        (TaskArithmetic(0.7), {"float32": True}),
        (TaskArithmetic(0.0), {}),
        (LayerSwap(keep_layers="0"), {}),
        (Ties(0.3, combine="max"), {}),
        (Ties(0.3, election="weighted"), {}),
    ],
)
def test_what_is_not_compiled_is_merged_by_torch(
    tmp_path: Path, method: Method, options: dict[str, Any], chunks: list[str]
) -> None:
    alignment = trio(tmp_path)
    if not isinstance(method, Ties):
        alignment = align(*(open_checkpoint(tmp_path / key) for key in KEYS), modules=["all"])
    fast, _ = merged(alignment, method, tmp_path / "fast", 0, **options)
    assert not [form for form in chunks if form != "lerp"]
    assert fast == merged(alignment, method, tmp_path / "slow", sys.maxsize, **options)[0]


def test_experts_and_other_vocabularies_are_merged_by_torch(tmp_path: Path, chunks: list[str]) -> None:
    build_experts(tmp_path / "experts")
    build(tmp_path / "rows", donor_rows=30)
    for folder in (tmp_path / "experts", tmp_path / "rows"):
        alignment = align(*(open_checkpoint(folder / key) for key in KEYS), modules=["all"])
        fast, _ = merged(alignment, TaskArithmetic(0.7), folder / "fast", 0)
        assert chunks, "the plain tensors are compiled"
        assert fast == merged(alignment, TaskArithmetic(0.7), folder / "slow", sys.maxsize)[0]


@pytest.mark.parametrize(("value", "error"), [(float("nan"), WeightsError), (3e38, NumericalError)])
def test_bad_weights_are_refused_in_torchs_words(tmp_path: Path, value: float, error: type[VlmgraftError]) -> None:
    trio(tmp_path)
    weights = load_file(tmp_path / "donor" / "model.safetensors")
    weights["model.layers.0.mlp.up_proj.weight"][7, 7] = value
    save(tmp_path / "bad", weights, model_type="qwen2")
    alignment = align(*(open_checkpoint(tmp_path / key) for key in ("vlm", "bad", "donor_base")))
    words = set()
    for at in (0, sys.maxsize):
        with pytest.raises(error, match="up_proj") as refusal:
            merged(alignment, TaskArithmetic(2.0), tmp_path / "out", at)
        words.add(str(refusal.value))
    assert len(words) == 1
    assert not (tmp_path / "out").exists()


def test_a_processor_for_which_torch_rounds_otherwise_has_torchs_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where numba would give other weights: they are not written."""
    alignment = trio(tmp_path)
    monkeypatch.setattr(compiled, "is_torch", lambda form: False)
    monkeypatch.setattr(compiled, "merge_chunk", lambda *given: pytest.fail("is not asked"))
    fast, _ = merged(alignment, Ties(0.3), tmp_path / "fast", 0)
    assert fast == merged(alignment, Ties(0.3), tmp_path / "slow", sys.maxsize)[0]


def test_the_probe_tells_a_wrong_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    assert all(map(compiled.is_torch, compiled.FORMS))
    monkeypatch.setitem(compiled.FORMS, "lerp", compiled.ADD)
    compiled.is_torch.cache_clear()
    assert not compiled.is_torch("lerp")
    compiled.is_torch.cache_clear()


def test_a_method_without_a_form_is_not_asked(tmp_path: Path) -> None:
    _, receipt = merged(trio(tmp_path), DareLinear(0.5), tmp_path / "out", 0)
    assert "numba" not in receipt["versions"]


@pytest.fixture
def unknown() -> Iterator[None]:
    """It is not yet known whether numba works, and is not afterwards."""
    merge_module._compiled_by.cache_clear()
    yield
    merge_module._compiled_by.cache_clear()


@pytest.mark.parametrize("error", [None, ImportError("needs NumPy 2.3 or less"), SystemError("built otherwise")])
def test_without_a_numba_that_works_torch_merges(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    chunks: list[str],
    caplog: pytest.LogCaptureFixture,
    error: Exception | None,
    unknown: None,
) -> None:
    def found(name: str) -> None:
        if error:
            raise error

    alignment = trio(tmp_path)
    monkeypatch.setattr(merge_module, "find_spec", found)
    _, receipt = merged(alignment, Ties(0.3), tmp_path / "out", 0)
    assert not chunks and "numba" not in receipt["versions"]
    assert [record.message for record in caplog.records if "numba" in record.message] == (
        [f"numba does not work here ({error!r}): merging in torch"] if error else []
    )


def test_a_zero_has_torchs_sign() -> None:
    """Nothing elected, weights below zero, a base of -0.0: torch's result is +0.0."""
    stored = {key: torch.tensor([-0.0, 0.0, 0.0]).bfloat16() for key in ALL}
    for method in (TaskArithmetic(-0.5), TrimmedTies(Ties(weights=(-0.5, -1.3)), {"": {"vlm": 0.0, "donor": 0.0}})):
        _, out, _, cast = both(method, stored)
        assert torch.equal(out.view(torch.int16), cast.view(torch.int16))


def test_a_home_that_cannot_be_written_costs_the_cache_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    ordinary = compiled.numba.njit

    def njit(*given: Any, cache: bool = False, **options: Any) -> Any:
        if cache:
            raise RuntimeError("cannot cache function: no locator available")  # numba's, where it finds no folder
        return ordinary(*given, **options)

    monkeypatch.setattr(compiled.numba, "njit", njit)
    assert compiled._compiled("int64(int64)")(lambda number: number + 1)(1) == 2
