"""How sharding looks on one process; gates of two are in test_distributed.py."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from vlmgraft.distillation.distill import Distiller
from vlmgraft.distillation.gated_layers import gated
from vlmgraft.distillation.sharding import gate_and_shard
from vlmgraft.hf.modules import match_projections


@pytest.fixture
def group(tmp_path: Path) -> Iterator[None]:
    """A process group of this process alone."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.usefixtures("group")
def test_a_sharded_model_of_one_process_computes_what_a_gated_one_does(distiller: Distiller) -> None:
    batch = distiller.targets.batches[0]
    spectra: dict[str, Any] = {name: 0.4 * factors.s for name, factors in distiller.factors.items()}
    with gated(distiller.model, distiller.linears, distiller.factors) as layers, torch.no_grad():
        layers.set(spectra)
        expected = batch.kl(distiller.model)
    model = copy.deepcopy(distiller.model)
    model, layers = gate_and_shard(model, match_projections(model, distiller.factors), distiller.factors)
    assert layers.keys() == distiller.factors.keys()
    assert not any(parameter.requires_grad for parameter in model.parameters())
    with torch.no_grad():
        assert float(batch.kl(model).max()) == pytest.approx(0, abs=1e-5), "gates are off at first"
        layers.set(spectra)
        assert torch.allclose(batch.kl(model), expected, atol=1e-5)
