"""The LoRA adapter: the best approximation at its rank, and PEFT loads it to the gated model's logits."""

from __future__ import annotations

import json
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings, strategies as st
from safetensors.torch import load_file

from vlmgraft.checkpoint.verify import verify
from vlmgraft.distillation.distill import Distiller
from vlmgraft.errors import AlignmentError, CheckpointError, OutputError, RecipeError
from vlmgraft.export.lora import adapter_places, lora_factors, write_lora, write_loras
from vlmgraft.hf.models import load_vlm
from vlmgraft.hf.modules import match_linears
from vlmgraft.spectral.factors import factorize
from vlmgraft.spectral.gates import Gates


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 8), st.integers(1, 8), st.integers(1, 10), st.integers(0, 9999))
def test_it_is_the_best_approximation_and_the_error_is_true(rows: int, columns: int, rank: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    factors = factorize(torch.randn(rows, columns, generator=generator), "w", "w")
    spectrum = factors.s * torch.rand(len(factors.s), generator=generator)
    update = factors.update(spectrum)
    A, B, dropped, whole = lora_factors(factors, spectrum, rank)
    assert A.shape == (rank, columns) and B.shape == (rows, rank)
    optimum = torch.linalg.svdvals(update.double())[rank:].square().sum()
    assert float((B @ A - update).square().sum()) == pytest.approx(float(optimum), abs=1e-5)
    assert dropped == pytest.approx(float(optimum), abs=1e-5)
    assert whole == pytest.approx(float(update.square().sum()), rel=1e-4)


@pytest.fixture(scope="module")
def exported(distiller: Distiller, vlm: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Gates]:
    folder = tmp_path_factory.mktemp("lora")
    vlm.save_pretrained(folder / "vlm")
    return folder, distiller.learn(steps=5, inject_weight=0.3)


def test_peft_loads_it_to_the_gated_logits(distiller: Distiller, exported: tuple[Path, Gates], tmp_path: Path) -> None:
    from peft import PeftModel

    folder, gates = exported
    report = write_lora(folder / "vlm", distiller.factors, gates, tmp_path / "full", 128, torch.float32)
    assert report.error <= 1e-6 and set(report.errors) == set(gates.logits)
    batch = distiller.targets.batches[0]
    model = PeftModel.from_pretrained(load_vlm(folder / "vlm", torch.float32), tmp_path / "full").eval()
    with torch.no_grad():
        found = model(**batch.inputs, use_cache=False).logits[batch.predicts]
        with distiller.applied(gates) as gated_model:
            expected = batch.logits(gated_model)
    assert torch.allclose(found, expected, atol=1e-4)


def test_peft_switches_between_the_points_of_a_front(
    distiller: Distiller, exported: tuple[Path, Gates], tmp_path: Path
) -> None:
    """`set_adapter` by request: each gives the logits of the weights that its gates are folded into."""
    from peft import PeftModel

    folder, gates = exported
    path = {"0.01": replace(gates, scale=0.5), "0.1": replace(gates, scale=2.0)}
    reports = write_loras(folder / "vlm", distiller.factors, path, tmp_path / "all", 128, torch.float32)
    checked = verify(tmp_path / "all")
    assert list(reports) == ["0.01", "0.1"] and checked.faults == checked.unlisted == ()
    batch, merged = distiller.targets.batches[0], {}
    with torch.no_grad():
        for name, one in path.items():
            model = load_vlm(folder / "vlm", torch.float32)
            for tensor, linear in match_linears(model, list(one.logits)).items():
                s = distiller.factors[tensor].s
                linear.weight += distiller.factors[tensor].update(one.spectrum(tensor, s))
            merged[name] = batch.logits(model)
        model = PeftModel.from_pretrained(load_vlm(folder / "vlm", torch.float32), tmp_path / "all" / "0.01", "low")
        model.load_adapter(tmp_path / "all" / "0.1", "high")
        for label, name in (("high", "0.1"), ("low", "0.01"), ("high", "0.1")):
            model.set_adapter(label)
            logits = model.eval()(**batch.inputs, use_cache=False).logits[batch.predicts]
            assert torch.allclose(logits, merged[name], atol=1e-4)
    assert not torch.allclose(merged["0.01"], merged["0.1"], atol=1e-2)
    with pytest.raises(OutputError, match="exists already"):
        write_loras(folder / "vlm", distiller.factors, path, tmp_path / "all", 4)


def test_a_smaller_rank_reports_a_larger_error(
    distiller: Distiller, exported: tuple[Path, Gates], tmp_path: Path
) -> None:
    folder, gates = exported
    errors = [write_lora(folder / "vlm", distiller.factors, gates, tmp_path / f"r{r}", r).error for r in (4, 16, 64)]
    assert 1 > errors[0] > errors[1] > errors[2] > 0
    assert json.loads((tmp_path / "r4" / "report.json").read_text())["error"] == errors[0]


def test_a_rank_beyond_the_matrices_writes_no_zeros(
    distiller: Distiller,
    exported: tuple[Path, Gates],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The largest matrix's smaller side is the most that any update can need; PEFT needs one rank for all."""
    folder, gates = exported
    monkeypatch.setattr(logging.getLogger("vlmgraft"), "propagate", True)  # a command of another test may have cut it
    caplog.set_level("WARNING", "vlmgraft")
    most = max(min(distiller.factors[name].shape) for name in gates.logits)
    report = write_lora(folder / "vlm", distiller.factors, gates, tmp_path / "all", 10**6)
    assert report.rank == most and report.error < 1e-6
    assert json.loads((tmp_path / "all" / "adapter_config.json").read_text())["r"] == most
    tensors = load_file(tmp_path / "all" / "adapter_model.safetensors")
    assert {value.shape[0] for name, value in tensors.items() if "lora_A" in name} == {most}
    assert f"of rank {most}, not 1000000" in caplog.text


def test_bad_inputs_are_named_and_nothing_is_written(
    distiller: Distiller, exported: tuple[Path, Gates], tmp_path: Path
) -> None:
    folder, gates = exported
    with pytest.raises(RecipeError, match="rank: 0"):
        write_lora(folder / "vlm", distiller.factors, gates, tmp_path / "new", 0)
    with pytest.raises(OutputError, match="exists already"):
        write_lora(folder / "vlm", distiller.factors, gates, folder, 4)
    with pytest.raises(CheckpointError, match="config"):
        write_lora(tmp_path, distiller.factors, gates, tmp_path / "new", 4)
    with pytest.raises(AlignmentError, match="embed_tokens"):
        adapter_places(folder / "vlm", {}, ["model.embed_tokens.weight"], 4)
    assert not (tmp_path / "new").exists()
