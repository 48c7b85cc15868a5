"""The command `steer`, and the commands that take what it writes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from vlmgraft.analysis.direction import contrast_direction
from vlmgraft.hf.models import load_processor, load_text_model
from vlmgraft.hf.steering import Steering, resample
from vlmgraft.lab.exam import draw_exam, save_questions


def test_the_commands(vlmgraft: Callable[..., Any], trio: Path, tmp_path: Path) -> None:
    """A vector is made, written and used by `evaluate` and `drift`; at strength 0 the KL is 0."""
    save_questions(draw_exam(0, "calibration", {"sum": 4}, as_image=False).questions, tmp_path / "q.jsonl")
    (tmp_path / "r.yaml").write_text(f"vlm: {trio / 'vlm'}\ndonor: {trio / 'donor'}\n")
    asked = ("steer", tmp_path / "r.yaml", "--questions", tmp_path / "q.jsonl", "--contrast", "answers", "--quiet")
    asked = (*asked, "--max-new-tokens", "28", "--out", tmp_path / "v.safetensors", "--json")
    ran = vlmgraft(*asked, "--strength", "0.2")
    assert ran.code == 0, ran.err
    facts = json.loads(ran.out)
    assert (facts["layer"], facts["donor_layer"], facts["samples"], facts["strength"]) == (2, 2, 4, 0.2)
    steering = Steering.load(tmp_path / "v.safetensors")
    model, processor = load_text_model(trio / "donor", torch.float32), load_processor(trio / "donor")
    questions = list(draw_exam(0, "calibration", {"sum": 4}, as_image=False).questions)
    raw = contrast_direction(model, processor, questions, 2, contrast="answers", max_new_tokens=28)
    torch.testing.assert_close(steering.direction, resample(raw, 128, 0.25), atol=1e-5, rtol=1e-4)
    save_questions(draw_exam(0, "test", {"read": 4}).questions, tmp_path / "d.jsonl")
    command = ("drift", trio / "vlm", trio / "vlm", "--data", tmp_path / "d.jsonl", "--quiet", "--json")
    command = (*command, "--steer", tmp_path / "v.safetensors")
    assert json.loads(vlmgraft(*command).out)["kl"] > json.loads(vlmgraft(*command, "--steer-strength", "0").out)["kl"]
    evaluate = ("evaluate", trio / "vlm", "--data", "lab", "--limit", "4", "--quiet", "--out", tmp_path / "e")
    assert vlmgraft(*evaluate, "--steer", tmp_path / "v.safetensors").code == 0
    ran = vlmgraft(*evaluate, "--steer-strength", "1", "--out", tmp_path / "f")
    assert ran.code == 2 and "no steering vector" in ran.err
