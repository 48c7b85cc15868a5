"""Distances agree with the norms written out naively over whole tensors, also where layouts are assembled."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from shutil import copytree

import pytest
import torch
from safetensors.torch import load_file, save_file
from zoo import Trio, text_model

from vlmgraft.alignment import align
from vlmgraft.alignment.distance import Distance, judge, measure_distances
from vlmgraft.checkpoint.index import open_checkpoint
from vlmgraft.errors import AlignmentError
from vlmgraft.lab import trio_path

Trios = Callable[[str], Trio]


@pytest.mark.parametrize("case", ["qwen2_5_vl", "qwen3_vl_moe"])
@pytest.mark.parametrize("own_base", [True, False])
def test_rows_are_the_norms_and_the_cosine(
    case: str, own_base: bool, trio: Trios, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vlmgraft.alignment.distance.CHUNK", 100)  # so that one matrix takes several chunks
    folders = trio(case)
    last = folders.vlm_base if own_base else folders.donor_base
    checkpoints = [open_checkpoint(one) for one in (folders.vlm, folders.donor, folders.donor_base)]
    alignment = align(
        *checkpoints, open_checkpoint(last) if own_base else None, modules=["attention", "mlp"], layers="1"
    )
    steps: list[tuple[int, int]] = []
    rows = measure_distances(alignment, progress=lambda done, total, _: steps.append((done, total)))
    assert steps[-1] == (len(alignment.merged),) * 2
    texts = [text_model(one) for one in (folders.vlm, folders.donor, folders.donor_base, last)]
    for group, inside in (("attention", "self_attn"), ("mlp", ".mlp.experts." if "moe" in case else ".mlp.")):
        names = [n for n in texts[0] if f"layers.1.{inside.strip('.')}" in n and texts[0][n].ndim > 1]
        w, d, b, v = (torch.cat([text[name].double().flatten() for name in names]) for text in texts)
        tau, own = d - b, w - v
        row = next(row for row in rows if row.group == group)
        expected = (w.norm(), tau.norm(), own.norm(), tau @ own / tau.norm() / own.norm())
        for got, value in zip((row.weight_norm, row.donor_norm, row.vlm_norm, row.cosine), expected, strict=True):
            assert got == pytest.approx(float(value), rel=1e-5)
        assert row.unchanged == pytest.approx(float((d == b).double().mean()))
        assert row.vlm_ratio == pytest.approx(float(own.norm() / w.norm()), rel=1e-5)
        assert row.layer == 1 and row.ratio == pytest.approx(float(tau.norm() / w.norm()), rel=1e-5)


def test_a_base_is_needed(trio: Trios) -> None:
    folders = trio("qwen2_5_vl")
    with pytest.raises(AlignmentError, match="need donor_base"):
        measure_distances(align(open_checkpoint(folders.vlm), open_checkpoint(folders.donor)))


def test_the_verdict_names_the_worst_row() -> None:
    safe = Distance(0, "attention", 10.0, 0.5, 0.5, 0.2)
    far = Distance(3, "mlp", 10.0, 5.0, 0.5, 0.2)
    opposed = Distance(None, "norm", 10.0, 0.5, 0.5, -0.4)
    assert judge((safe,)).level == "safe"
    verdict = judge((safe, far, opposed))
    assert verdict.level == "risky"
    assert "mlp of layer 3" in verdict.reason and "norm: cosine -0.400" in verdict.reason


@pytest.mark.parametrize(("donor", "vlm", "who"), [(14.1, 0.5, "the donor from its base"), (0.5, 14.1, "the VLM")])
def test_models_without_a_common_base_are_hopeless(donor: float, vlm: float, who: str) -> None:
    verdict = judge((Distance(0, "mlp", 10.0, donor, vlm, 0.0), Distance(1, "mlp", 10.0, donor, vlm, 0.0)))
    assert verdict.level == "hopeless" and f"{who} by 1.41" in verdict.reason


def test_unchanged_entries_are_counted(tmp_path: Path) -> None:
    """A donor that was tuned in some rows only: the share of zeros is the share of the other rows."""
    folders = {name: copytree(trio_path() / name, tmp_path / name) for name in ("vlm", "base", "donor")}
    file = folders["donor"] / "model.safetensors"
    tensors, base = load_file(file), load_file(folders["base"] / "model.safetensors")
    name = "model.layers.2.mlp.up_proj.weight"
    tensors[name] = base[name].clone()
    tensors[name][:64] += 1
    save_file(tensors, file, metadata={"format": "pt"})
    vlm, base_, donor = (open_checkpoint(folders[key]) for key in ("vlm", "base", "donor"))
    rows = measure_distances(align(vlm, donor, base_, modules=["*.layers.2.mlp.up_proj.weight"]))
    assert [row.unchanged for row in rows] == [1 - 64 / len(base[name])]
