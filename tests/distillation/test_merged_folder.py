"""Gates folded into a checkpoint folder give, after reloading, what the gated model gives in memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from vlmgraft.distillation.distill import Distiller
from vlmgraft.hf.models import load_processor, load_vlm
from vlmgraft.methods.frism import GatedFold


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.bfloat16, 5e-2)])
def test_a_reloaded_folder_gives_the_gated_logits(
    distiller: Distiller, processor: Any, vlm: Any, tmp_path: Path, dtype: torch.dtype, tolerance: float
) -> None:
    gates = distiller.learn(scale=1.0, steps=5, inject_weight=0.3)
    vlm.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    merge, file = GatedFold(distiller.factors, gates), tmp_path / "model.safetensors"
    tensors = {
        name: (merge.matrix(name, tensor) if name in gates.logits else tensor).to(dtype)
        for name, tensor in load_file(file).items()
    }
    assert all(name in tensors for name in gates.logits), "factors are named as tensors are on disk"
    save_file(tensors, file, metadata={"format": "pt"})
    reloaded, batch = load_vlm(tmp_path, dtype=torch.float32), distiller.targets.batches[0]
    with torch.no_grad():
        plain = batch.logits(vlm)
        with distiller.applied(gates) as model:
            expected = batch.logits(model)
        found = reloaded(**batch.inputs, use_cache=False).logits[batch.predicts]
    moved = float((expected - plain).norm())
    assert float((found - expected).norm()) <= tolerance * moved
    assert distiller.keep_kl(reloaded) == pytest.approx(distiller.keep_kl(gates), rel=10 * tolerance)
    assert load_processor(tmp_path).tokenizer.get_vocab() == processor.tokenizer.get_vocab()
