"""A folder of gates: what is written is read back, what is damaged or foreign is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from vlmgraft.errors import CheckpointError, OutputError
from vlmgraft.spectral.gate_store import load_gates, save_gates
from vlmgraft.spectral.gates import Gates

GATES = Gates(
    {"a.weight": torch.tensor([0.5, -torch.inf]), "experts": torch.zeros(2, 3)},
    1.25,
    {"inject": "energy", "kl_budget": 0.01},
    ({"step": 0, "kl": 0.1},),
    "digest",
)


def test_gates_survive_the_folder(tmp_path: Path) -> None:
    save_gates(GATES, tmp_path / "gates")
    loaded = load_gates(tmp_path / "gates")
    assert loaded.logits.keys() == GATES.logits.keys()
    assert all(value.equal(GATES.logits[name]) for name, value in loaded.logits.items())
    assert (loaded.scale, loaded.settings, loaded.log, loaded.factors) == (1.25, GATES.settings, GATES.log, "digest")
    save_gates(Gates({"a.weight": torch.ones(1)}, 2.0), tmp_path / "gates")
    assert load_gates(tmp_path / "gates").scale == 2.0 and load_gates(tmp_path / "gates").factors is None


def test_a_folder_of_something_else_is_kept(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(OutputError, match=r"holds notes\.txt, which is not of gates"):
        save_gates(GATES, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


@pytest.mark.parametrize("change", [{"scale": "1.25"}, {"scale": float("inf")}, {"scale": True}, {"factors": 7}])
def test_settings_that_are_none_are_refused(tmp_path: Path, change: dict[str, object]) -> None:
    save_gates(GATES, tmp_path / "gates")
    file = tmp_path / "gates" / "gates.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **change}))
    with pytest.raises(CheckpointError, match=r"gates\.json: not of a complete gates folder"):
        load_gates(tmp_path / "gates")


@pytest.mark.parametrize(
    "logits", [torch.tensor([torch.nan]), torch.zeros(2, dtype=torch.float16), torch.zeros(1, 1, 1)]
)
def test_logits_that_are_none_are_refused(tmp_path: Path, logits: torch.Tensor) -> None:
    save_gates(GATES, tmp_path / "gates")
    save_file({"a.weight": logits}, tmp_path / "gates" / "gates.safetensors")
    with pytest.raises(CheckpointError, match=r"gates\.safetensors: not of a complete gates folder"):
        load_gates(tmp_path / "gates")
