"""Layers that wait in the host's memory: the same gates, nothing left behind; what is chosen, and what it takes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import vlmgraft as vg
from tests.distillation.test_learn import recipe_of
from vlmgraft.distillation import loading
from vlmgraft.distillation.sharding import shard
from vlmgraft.distillation.trainer import GateTrainer

OPTIONS: dict[str, Any] = {"steps": 12, "inject": "donor", "donor_tokens": 4, "learning_rate": 0.2, "kl_budget": 0.01,
                           "inject_weight": None, "start": "curvature", "gradient_checkpointing": True}  # fmt: skip


def learned(recipe: dict[str, Any], offload: bool, factors: Path, out: Path) -> dict[str, torch.Tensor]:
    logits = dict(vg.gates(recipe, factors, out, overrides=[f"method.offload={offload}".lower()]).logits)
    assert not torch.distributed.is_initialized(), "the group is left"
    return logits


@pytest.fixture
def recipe(trio: Path, image_calibration: Path, tmp_path: Path) -> dict[str, Any]:
    (tmp_path / "told.jsonl").write_text('{"question": "sum 3"}\n{"question": "sum 5"}\n')
    return recipe_of(trio, image_calibration, **OPTIONS, questions=str(tmp_path / "told.jsonl"))


def test_one_process_learns_the_same_gates(recipe: dict[str, Any], tmp_path: Path) -> None:
    """Answers, curvature, donor matching, a budget; the second time after an interruption, in the same process."""
    calls: list[bool] = []

    def counted(model: Any, device: torch.device, *, offload: bool) -> Any:
        calls.append(offload)
        return shard(model, device, offload=offload)

    vg.decompose(recipe, tmp_path / "factors")
    whole = learned(recipe, False, tmp_path / "factors", tmp_path / "whole")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loading, "shard", counted)
        offloaded = learned(recipe, True, tmp_path / "factors", tmp_path / "offloaded")
    assert calls == [True, True], "the donor and the VLM"
    keep = GateTrainer._keep

    def killed(self: GateTrainer, state: Path, step: int) -> None:
        keep(self, state, step)
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(GateTrainer, "_keep", killed)
        learned(recipe, True, tmp_path / "factors", tmp_path / "killed")
    assert not torch.distributed.is_initialized() and (tmp_path / "killed.state").is_file()
    resumed = learned(recipe, True, tmp_path / "factors", tmp_path / "killed")
    assert float(torch.cat([*whole.values()]).std()) > 0.1
    for name, logits in whole.items():
        assert torch.equal(offloaded[name], logits) and torch.equal(resumed[name], logits), name
    for path in (tmp_path / "whole.teacher").rglob("*.safetensors"):  # under the same keys: one run takes the other's
        same = load_file(tmp_path / "offloaded.teacher" / path.relative_to(tmp_path / "whole.teacher"))
        assert all(torch.equal(same[key], value) for key, value in load_file(path).items())


def test_curvature_gates_are_the_same(trio: Path, image_calibration: Path, tmp_path: Path) -> None:
    recipe = recipe_of(trio, image_calibration)
    kept = {key: recipe["method"][key] for key in ("rank", "calibration") if key in recipe["method"]}
    recipe["method"] = {"name": "curvature", "kl_budget": 0.05, **kept}
    vg.decompose(recipe, tmp_path / "factors")
    whole, offloaded = (learned(recipe, way, tmp_path / "factors", tmp_path / str(way)) for way in (False, True))
    assert all(torch.equal(offloaded[name], logits) for name, logits in whole.items())
