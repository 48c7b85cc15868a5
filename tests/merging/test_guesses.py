"""Thresholds that TIES takes from a sample: borne out by the merge, or the merge is made again; exact in any case."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from merge_builders import SIDE, Tensors, bytes_in, decoder, save
from safetensors.torch import load_file

from vlmgraft.alignment import Alignment, align
from vlmgraft.checkpoint.index import open_checkpoint
from vlmgraft.errors import NumericalError
from vlmgraft.merging import merge as merge_module, merge_tensors
from vlmgraft.merging.engine import Merger
from vlmgraft.merging.pieces import MergedPasses
from vlmgraft.methods.ties import Ties


@pytest.fixture(autouse=True, params=["torch", "compiled"])
def arithmetic(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Whether merges are compiled."""
    if request.param == "compiled":
        pytest.importorskip("numba")
    monkeypatch.setattr(merge_module, "WORTH_COMPILING", 0 if request.param == "compiled" else sys.maxsize)
    return str(request.param)


KEYS = ("vlm", "donor", "donor_base", "vlm_base")
STEP = 2.0**-7
"""Steps of the task vectors: in bfloat16 numbers from 1 to 2 lie so far apart."""


def build(folder: Path, misleading: bool) -> Alignment:
    """A Qwen2.5-VL-like VLM and three text models; of task vectors only two magnitudes, 1 and 2 steps. What is looked
    at first of every tensor, its beginning, is like the rest, or (misleading) 1 step everywhere."""
    torch.manual_seed(0)
    base = {name: torch.ones_like(tensor) for name, tensor in decoder().items()}
    models = {"donor_base": base, "vlm_base": base, "vlm": moved(base, misleading), "donor": moved(base, misleading)}
    for key, tensors in models.items():
        more = {"visual.blocks.0.weight": torch.randn(3, 3)} if key == "vlm" else {}
        save(folder / key, {**tensors, **more}, model_type="qwen2_5_vl" if key == "vlm" else "qwen2")
    return align(*(open_checkpoint(folder / key) for key in KEYS))


def moved(base: Tensors, misleading: bool) -> Tensors:
    found = {}
    for name, tensor in base.items():
        steps = torch.randint(1, 3, tensor.shape)
        if misleading:
            steps.view(-1)[: -(-steps.numel() // 64)] = 1
        found[name] = (tensor.float() + STEP * steps).bfloat16()
    return found


def merged(alignment: Alignment, out: Path, **options: Any) -> bytes:
    merge_tensors(alignment, Ties(0.25), out, **options)
    return bytes_in(out)


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, bool]]:
    """(one element in so many, whether a guess was allowed) of every pass over the weights."""
    begun: list[tuple[int, bool]] = []
    ordinary = MergedPasses.map

    def watched(self: MergedPasses, function: Any, *, sample: int = 1) -> Any:
        begun.append((sample, self.may_guess))
        return ordinary(self, function, sample=sample)

    monkeypatch.setattr(MergedPasses, "map", watched)
    return begun


def exact(alignment: Alignment, out: Path, monkeypatch: pytest.MonkeyPatch) -> bytes:
    """The merge by a pass over all weights."""
    with monkeypatch.context() as patch:
        patch.setattr(MergedPasses, "may_guess", property(lambda self: False, lambda self, value: None))
        return merged(alignment, out)


def test_a_guess_that_is_borne_out_spares_the_pass(
    tmp_path: Path, passes: list[tuple[int, bool]], monkeypatch: pytest.MonkeyPatch
) -> None:
    alignment = build(tmp_path, misleading=False)
    found = merged(alignment, tmp_path / "out")
    assert passes == [(64, True), (64, True)]
    assert found == exact(alignment, tmp_path / "exact", monkeypatch)
    assert passes[2:] == [(64, False), (1, False)]


def test_a_wrong_guess_is_found_out_and_mended(
    tmp_path: Path, passes: list[tuple[int, bool]], monkeypatch: pytest.MonkeyPatch
) -> None:
    alignment = build(tmp_path, misleading=True)
    found = merged(alignment, tmp_path / "out")
    assert passes[:2] == [(64, True), (64, True)] and (1, True) not in passes, "it was a guess"
    assert (64, False) in passes and (1, False) in passes, "and the merge was made again"
    assert found == exact(alignment, tmp_path / "exact", monkeypatch)
    assert not list(tmp_path.glob(".out*"))
    tau = [load_file(tmp_path / key / "model.safetensors") for key in ("donor", "donor_base")]
    (donor, base), name = tau, "model.layers.0.mlp.up_proj.weight"
    assert (donor[name] - base[name]).float().abs().view(-1)[: SIDE * SIDE // 64].unique().tolist() == [STEP]


@pytest.mark.parametrize("misleading", [False, True])
def test_an_interrupted_guess_goes_on(tmp_path: Path, misleading: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was written before the interruption counts, too."""
    alignment = build(tmp_path, misleading)

    def stop(done: int, total: int, name: str) -> None:
        if done == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        merged(alignment, tmp_path / "out", resume=True, progress=stop)
    assert list(tmp_path.glob(".out.partial-*"))
    found = merged(alignment, tmp_path / "out", resume=True)
    assert found == exact(alignment, tmp_path / "exact", monkeypatch)


def test_the_second_attempt_goes_on_where_it_was_interrupted(
    tmp_path: Path, passes: list[tuple[int, bool]], monkeypatch: pytest.MonkeyPatch
) -> None:
    alignment = build(tmp_path, misleading=True)
    seen: list[int] = []

    def stop(done: int, total: int, name: str) -> None:
        seen.append(done)
        if done == 5 and 1 in seen[1:]:  # counted from 1 again
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        merged(alignment, tmp_path / "out", resume=True, progress=stop)
    passes.clear()
    seen.clear()
    found = merged(alignment, tmp_path / "out", resume=True, progress=lambda done, total, name: seen.append(done))
    assert seen[0] == 6 and not any(guess for _, guess in passes)
    assert found == exact(alignment, tmp_path / "exact", monkeypatch)
    assert not list(tmp_path.glob(".out*"))


def test_a_wrong_guess_that_overflows_refuses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the exact threshold would have trimmed is beyond float16 once it is added."""
    alignment = build(tmp_path, misleading=True)
    ordinary, attempts = Merger._write, list[bool]()

    def overflowing(self: Merger, *arguments: Any) -> Any:
        attempts.append(self.method.guessed)
        if self.method.guessed:
            raise NumericalError("overflows")
        return ordinary(self, *arguments)

    monkeypatch.setattr(Merger, "_write", overflowing)
    monkeypatch.setattr(Merger, "_fused", lambda *_: None)  # as the compiled pass decides near the end of the dtype
    found = merged(alignment, tmp_path / "out")
    assert attempts[0] and not attempts[-1] and found == exact(alignment, tmp_path / "exact", monkeypatch)
    monkeypatch.setattr(Merger, "_write", lambda *_: (_ for _ in ()).throw(NumericalError("overflows")))
    with pytest.raises(NumericalError):
        merged(alignment, tmp_path / "never")


def test_all_of_a_task_vector_is_kept_without_a_pass(tmp_path: Path, passes: list[tuple[int, bool]]) -> None:
    alignment = build(tmp_path, misleading=True)
    merge_tensors(alignment, Ties(1.0), tmp_path / "out")
    assert {sample for sample, _ in passes} == {64}, "no pass over all"
    with_all, name = load_file(tmp_path / "out" / "model.safetensors"), "model.layers.0.mlp.up_proj.weight"
    vlm, donor, base = (load_file(tmp_path / key / "model.safetensors")[name].float() for key in KEYS[:3])
    assert torch.equal(with_all[name], ((vlm + donor) / 2).bfloat16()), "both grow everywhere: their mean"
    assert not torch.equal(vlm, base)
