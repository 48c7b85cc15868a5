"""The vision tower runs once for each image of a learning run, and not at all where its answers are on disk."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers.models.qwen2_5_vl import modeling_qwen2_5_vl as qwen

import vlmgraft as vg
from vlmgraft.distillation.distill import Distiller
from vlmgraft.distillation.prompts import Prompts, placeholders
from vlmgraft.hf.batches import generate_batch
from vlmgraft.hf.features import ImageFeatures
from vlmgraft.spectral.gate_store import load_gates


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[bytes]:
    """Every image's pixels, each time that the tower reads it."""
    images: list[bytes] = []
    tower = qwen.Qwen2_5_VisionTransformerPretrainedModel.forward

    def watched(self: Any, hidden_states: torch.Tensor, grid_thw: torch.Tensor, **options: Any) -> Any:
        patches = hidden_states.split(grid_thw.prod(-1).tolist())
        images.extend(patch.float().numpy().tobytes() for patch in patches)
        return tower(self, hidden_states, grid_thw=grid_thw, **options)

    monkeypatch.setattr(qwen.Qwen2_5_VisionTransformerPretrainedModel, "forward", watched)
    return images


def test_a_whole_run_reads_every_image_once(
    trio: Path, image_calibration: Path, tmp_path: Path, seen: list[bytes]
) -> None:
    calibration = {"data": str(image_calibration), "samples": 12, "held_out": 8, "max_new_tokens": 4, "batch_size": 5}
    method = {"name": "frism", "steps": 6, "learning_rate": 0.2, "kl_budget": 0.01, "start": "curvature"}
    places = {"vlm": str(trio / "vlm"), "donor": str(trio / "donor"), "donor_base": str(trio / "base")}
    calibration["answer_batch_size"] = 7
    recipe, work = {**places, "method": {**method, "calibration": calibration}, "layers": "0-1"}, tmp_path / "work"
    vg.merge(recipe, tmp_path / "merged", workdir=work)
    assert len(seen) == len(set(seen)) == 20
    first = load_gates(work / "gates")
    shutil.rmtree(work / "gates")
    vg.merge(recipe, tmp_path / "again", workdir=work)
    assert len(seen) == 20, "their features are kept with the answers"
    second = load_gates(work / "gates")
    assert all(torch.equal(second.logits[name], logits) for name, logits in first.logits.items())


def test_a_model_with_its_own_way_with_features_runs_its_tower_again(
    distiller: Distiller, seen: list[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    side = distiller.model, distiller.processor
    features, asked = ImageFeatures(side[0], placeholders(side[0])), distiller.questions[:3]
    prompts = Prompts(side, asked, [[3, 4]] * 3, [[0, 1, 2]], placeholders(side[0]), "answer", features)
    with features.recorded() as found:
        generate_batch(*side, asked, 2)
    expected = prompts.batch(0).captured
    assert len(seen) == 3 + 3 and expected is not None, "once while they are answered, once as nothing is kept yet"
    features.keep(range(3), found)
    joined = features._joined

    def bent(numbers: Any) -> Any:
        output = joined(numbers)
        output.pooler_output = [part / 2 for part in output.pooler_output]
        return output

    monkeypatch.setattr(features, "_joined", bent)
    captured = prompts.batch(0).captured
    assert len(seen) == 9 and features.encoder is None and not features.rows
    assert captured is not None and torch.allclose(captured["inputs_embeds"], expected["inputs_embeds"], atol=1e-5)
    features.keep(range(3), found)
    assert not features.rows, "nothing is kept of such a model"
