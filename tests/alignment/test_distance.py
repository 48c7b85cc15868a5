"""Distances agree with the norms written out naively over whole tensors, also where layouts are assembled."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from shutil import copytree
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from zoo import Trio, text_model

from vlmgraft.alignment import align
from vlmgraft.alignment.distance import Distance, extent_of, measure_distances
from vlmgraft.checkpoint.index import open_checkpoint
from vlmgraft.errors import AlignmentError
from vlmgraft.lab import trio_path

Trios = Callable[[str], Trio]


@pytest.mark.parametrize("case", ["qwen2_5_vl", "qwen3_vl_moe"])
@pytest.mark.parametrize("own_base", [True, False])
def test_rows_are_the_norms_and_the_cosine(
    case: str, own_base: bool, zoo: Trios, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vlmgraft.alignment.distance.CHUNK", 100)  # so that one matrix takes several chunks
    folders = zoo(case)
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


def test_a_base_is_needed(zoo: Trios) -> None:
    folders = zoo("qwen2_5_vl")
    with pytest.raises(AlignmentError, match="need donor_base"):
        measure_distances(align(open_checkpoint(folders.vlm), open_checkpoint(folders.donor)))


def test_layers_stand_in_the_order_of_their_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not as texts, in which a file lists them: 10 before 2. Tensors outside the layers come last."""
    order = [("10", 10), ("2", 2), (None, None), ("0", 0)]
    tensors = [SimpleNamespace(name=str(name), layer=layer, group="mlp") for name, layer in order]
    chunk = torch.ones(4)
    reader = SimpleNamespace(chunks=lambda tensor: [(chunk, 2 * chunk, chunk, chunk)])
    monkeypatch.setattr("vlmgraft.alignment.distance._Readers", lambda *_: reader)
    rows = measure_distances(SimpleNamespace(merged=tensors, donor_base="base"))  # type: ignore[arg-type]
    assert [row.layer for row in rows] == [0, 2, 10, None]


def test_the_extent_names_the_extreme_rows_and_calls_nothing_safe() -> None:
    """Medians of three rows by hand."""
    rows = (
        Distance(0, "attention", 10.0, 0.5, 0.6, 0.2),
        Distance(3, "mlp", 10.0, 5.0, 0.8, 0.2),
        Distance(None, "norm", 10.0, 0.7, 14.1, -0.4),
    )
    extent = extent_of(rows)
    assert (extent.median_ratio, extent.median_vlm_ratio) == pytest.approx((0.07, 0.08))
    assert (extent.largest_ratio, extent.largest_at) == (pytest.approx(0.5), "mlp of layer 3")
    assert (extent.smallest_cosine, extent.smallest_at) == (-0.4, "norm")
    assert "at most 0.500 (mlp of layer 3)" in str(extent) and "safe" not in str(extent)


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
