"""Gates are read as torch reads them."""

from __future__ import annotations

from pathlib import Path

import pytest

from vlmgraft.report.gate_folder import layer_and_projection, read_gates


def test_gates_are_read_as_torch_reads_them(runs: Path) -> None:
    import torch

    from vlmgraft.spectral.gate_store import load_gates

    found, gates = read_gates(runs / "work" / "gates"), load_gates(runs / "work" / "gates")
    s = torch.linspace(1, 0.1, 32)
    for row in found.matrices:
        opened = gates.open(row["name"])
        assert row["open"] == pytest.approx(float(opened.mean()))
        assert row["injected"] == pytest.approx(float((opened * s).square().sum() / s.square().sum()), rel=1e-5)
        assert row["by_rank"][0] == pytest.approx(float(opened[:2].mean()))
        assert row["spread"][0] == pytest.approx(float(opened[:2].std(correction=0)), rel=1e-3)
    assert sum(found.histogram) == 6 * 32
    assert {(row["layer"], row["projection"]) for row in found.matrices} == {
        (layer, name) for layer in range(3) for name in ("q_proj", "up_proj")
    }


@pytest.mark.parametrize(
    ("name", "place"),
    [
        ("model.language_model.layers.3.self_attn.q_proj.weight", (3, "q_proj")),
        ("layers.12.mlp.experts.gate_up_proj", (12, "gate_up_proj")),
        ("lm_head.weight", None),
    ],
)
def test_places(name: str, place: tuple[int, str] | None) -> None:
    assert layer_and_projection(name) == place
