"""DRIFT's Δ from folders and from gates: the difference of the files, and a verdict for every tensor."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from vlmgraft.alignment import Alignment, align
from vlmgraft.checkpoint.index import open_checkpoint
from vlmgraft.errors import AlignmentError, CheckpointError, WeightsError
from vlmgraft.finetuning.delta import filtered_prior, load_prior, make_prior
from vlmgraft.finetuning.prior import PushRule
from vlmgraft.spectral.factor_store import FactorStore
from vlmgraft.spectral.factors import factorize
from vlmgraft.spectral.gates import constant_gates

MODULES = ("attention", "norm")
Q0 = "model.layers.0.self_attn.q_proj.weight"


def aligned(trio: Path, donor: Path | None = None, modules: Any = MODULES) -> Alignment:
    folders = (trio / "vlm", donor or trio / "donor", trio / "base")
    return align(*(open_checkpoint(folder) for folder in folders), modules=modules)


def changed(folder: Path, to: Path, name: str, value: float | None) -> Path:
    """A copy of a checkpoint with one tensor filled, or as it is."""
    shutil.copytree(folder, to)
    tensors = load_file(to / "model.safetensors")
    if value is not None:
        tensors[name].fill_(value)
    save_file(tensors, to / "model.safetensors", metadata={"format": "pt"})
    return to


@pytest.mark.parametrize("minus", ["vlm", "base"])
def test_delta_is_the_difference_of_the_folders_and_every_tensor_has_a_verdict(trio: Path, minus: Any) -> None:
    prior = make_prior(aligned(trio), PushRule(), minus=minus, dtype=torch.float32)
    files = {name: load_file(trio / name / "model.safetensors") for name in ("vlm", "donor", "base")}
    assert {verdict.name for verdict in prior.verdicts} == set(files["vlm"])
    pushed_names = {verdict.name for verdict in prior.verdicts if verdict.verdict == "pushed"}
    assert pushed_names == set(prior.deltas) and Q0 in pushed_names
    assert all(verdict.reason for verdict in prior.verdicts)
    for name, delta in prior.deltas.items():
        expected = files["donor"][name].float() - files[minus][name].float()
        assert delta.value.equal(expected), name
        assert delta.norm == pytest.approx(float(expected.norm()), rel=1e-5)
        assert delta.start == pytest.approx(float((files["vlm"][name].float() * expected).sum()), abs=1e-3)


def test_a_prior_behind_gates(trio: Path, tmp_path: Path) -> None:
    alignment = aligned(trio, modules=["*.q_proj.weight", "norm"])
    full = make_prior(alignment, minus="base", dtype=torch.float32)
    factors = {Q0: factorize(full.deltas[Q0].value, Q0, "layers.0.self_attn.q_proj.weight")}
    gates = constant_gates({Q0: len(factors[Q0].s)}, 0.0, scale=3.0)
    prior = filtered_prior(alignment, factors, gates, dtype=torch.float32)
    assert list(prior.deltas) == [Q0]  # half open everywhere: half of the task vector, whatever λ is
    assert torch.allclose(prior.deltas[Q0].value, full.deltas[Q0].value / 2, atol=1e-5)
    reasons = {verdict.name: verdict.reason for verdict in prior.verdicts}
    assert "no gates" in reasons["model.layers.1.self_attn.q_proj.weight"]
    shut = constant_gates({Q0: len(factors[Q0].s)}, -float("inf"), scale=1.0)
    with pytest.raises(AlignmentError, match="nothing to push"):
        filtered_prior(alignment, factors, shut)


def test_a_prior_of_several_processes_derives_its_values_again(trio: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It keeps norms, verdicts and digests; Δ is the same bit for bit, with and without gates."""
    alignment = aligned(trio, modules=["*.q_proj.weight"])
    matrix = make_prior(alignment, minus="base", dtype=torch.float32).deltas[Q0].value
    factors = {Q0: factorize(matrix, Q0, "layers.0.self_attn.q_proj.weight")}
    gates = constant_gates({Q0: len(factors[Q0].s)}, 0.0, scale=3.0)
    for make in (lambda: make_prior(alignment), lambda: filtered_prior(alignment, factors, gates)):
        monkeypatch.setenv("WORLD_SIZE", "1")
        alone = make()
        monkeypatch.setenv("WORLD_SIZE", "2")
        shared = make()
        assert shared.verdicts == alone.verdicts and shared.sources == alone.sources
        with shared.values() as value_of, alone.values() as kept:
            for name, delta in alone.deltas.items():
                assert shared.deltas[name].value.is_meta and shared.deltas[name].norm == delta.norm
                assert value_of(name).equal(delta.value) and kept(name) is delta.value


def test_gates_of_other_factors_are_refused(trio: Path, tmp_path: Path) -> None:
    store = FactorStore(tmp_path)
    store.save(factorize(torch.ones(4, 3), Q0, "role"), "digest")
    store.finish([Q0], {"rank": "full"})
    gates = replace(constant_gates({Q0: 3}, 0.0, 1.0), factors="two")
    with pytest.raises(CheckpointError, match=f"factors two, these are {store.digest}"):
        filtered_prior(aligned(trio), store, gates)


def test_one_zero_delta_is_said(trio: Path, tmp_path: Path) -> None:
    base = load_file(trio / "base" / "model.safetensors")
    donor = tmp_path / "donor"
    shutil.copytree(trio / "donor", donor)
    tensors = load_file(donor / "model.safetensors") | {Q0: base[Q0]}
    save_file(tensors, donor / "model.safetensors", metadata={"format": "pt"})
    prior = make_prior(aligned(trio, donor), minus="base")
    assert Q0 not in prior.deltas
    assert {verdict.name: verdict.verdict for verdict in prior.verdicts}[Q0] == "zero"


def test_bad_priors_are_named_before_training(trio: Path, tmp_path: Path) -> None:
    same = changed(trio / "base", tmp_path / "same", Q0, None)
    with pytest.raises(AlignmentError, match="Δ is zero for every selected tensor"):
        make_prior(aligned(trio, same), minus="base")
    without = align(open_checkpoint(trio / "vlm"), open_checkpoint(trio / "donor"))
    with pytest.raises(AlignmentError, match="donor_base"):
        make_prior(without, minus="base")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize(
    ("key", "minus"), [("donor", "vlm"), ("donor", "base"), ("base", "base"), ("vlm", "vlm"), ("vlm", "base")]
)
def test_a_tensor_that_is_not_finite_is_named_with_its_checkpoint(
    value: float, key: str, minus: Any, trio: Path, tmp_path: Path
) -> None:
    folders = {name: trio / name for name in ("vlm", "donor", "base")}
    folders[key] = changed(trio / key, tmp_path / "broken", Q0, value)
    alignment = align(*(open_checkpoint(folder) for folder in folders.values()), modules=MODULES)
    with pytest.raises(WeightsError, match=r"q_proj\.weight of .*/broken: holds NaN or infinity; fetch it again"):
        make_prior(alignment, minus=minus)


def test_factors_that_are_not_finite_are_named(trio: Path) -> None:
    factors = factorize(torch.ones(128, 128), Q0, "layers.0.self_attn.q_proj.weight")
    factors.U[0, 0] = torch.nan
    with pytest.raises(WeightsError, match=rf"{Q0} of the factors: holds NaN or infinity"):
        filtered_prior(aligned(trio), {Q0: factors}, constant_gates({Q0: len(factors.s)}, 0.0, scale=1.0))


def test_what_is_finite_is_proved_by_its_norms(trio: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "isfinite", lambda _: 1 / 0)
    assert make_prior(aligned(trio), minus="base").deltas


def test_a_prior_by_folders_is_the_one_of_their_alignment(trio: Path) -> None:
    folders = (trio / "vlm", trio / "donor", trio / "base")
    prior = load_prior(*folders, modules=["*.q_proj.weight"], layers="0", mode="grad_norm", strength=0.5, minus="base")
    assert list(prior.deltas) == [Q0] and prior.rule == PushRule("grad_norm", 0.5)
    base, donor = (load_file(trio / name / "model.safetensors")[Q0].float() for name in ("base", "donor"))
    assert prior.deltas[Q0].value.equal((donor - base).bfloat16())
    assert set(prior.sources) == {"vlm", "donor", "donor_base"}
    assert all(list(read) == [Q0] for read in prior.sources.values())


def test_a_tensor_has_the_share_of_the_first_entry_and_no_entry_is_without_effect(trio: Path) -> None:
    folders = (trio / "vlm", trio / "donor")
    prior = load_prior(*folders, modules={"*.q_proj.weight": 0.0, "attention": 0.5}, layers="0")
    assert {name.split(".")[-2]: delta.share for name, delta in prior.deltas.items()} == {
        "q_proj": 0.0, "k_proj": 0.5, "v_proj": 0.5, "o_proj": 0.5,
    }  # fmt: skip
    with pytest.raises(AlignmentError, match=r"\*\.q_proj\.weight has no effect: attention stands before it"):
        load_prior(*folders, modules={"attention": 0.5, "*.q_proj.weight": 0.0}, layers="0")
    equal = load_prior(*folders, modules=["attention", "*.q_proj.weight"], layers="0")
    assert {delta.share for delta in equal.deltas.values()} == {1.0}
