"""How sharding looks on one process; gates of two and four are in test_distributed.py."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.testing._internal.distributed.fake_pg import FakeStore

from vlmgraft.distillation.distill import Distiller
from vlmgraft.distillation.gated_layers import gated
from vlmgraft.distillation.sharding import OwnRows, gate_and_shard, group_mesh
from vlmgraft.hf.modules import is_shard, match_projections
from vlmgraft.spectral.factor_store import FactorStore
from vlmgraft.spectral.factors import Factors


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


@pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="counts mapped pages as Linux tells them")
@pytest.mark.parametrize("rank", [0, 2, 3])
def test_a_process_takes_its_rows_of_factors_and_reads_no_others(rank: int, tmp_path: Path) -> None:
    """Seven rows among four processes: two each, and one for the last; the file's other pages stay on the disk."""
    random, r = torch.Generator().manual_seed(0), 3
    small = Factors(
        "a", "a", *(torch.randn(7, r, generator=random), torch.ones(r), torch.randn(r, 5, generator=random)), 1, 0
    )
    wide = Factors("b", "b", torch.ones(4_000_000, 4), torch.ones(4), torch.ones(4, 8), 1, 0)
    store = FactorStore(tmp_path)
    for factors in (small, wide):
        store.save(factors, "0")
    store.finish(["a", "b"], {})
    torch.distributed.init_process_group("fake", store=FakeStore(), rank=rank, world_size=4)
    try:
        mesh = group_mesh(torch.device("cpu"))
        rows = OwnRows(store, {name: torch.empty(0, dtype=torch.bfloat16) for name in "ab"}, mesh)
        for name in ("U", "Vh"):
            whole, own = getattr(small, name).bfloat16(), getattr(rows["a"], name)
            expected = (*whole.chunk(4), whole[:0])[rank]
            assert is_shard(own) and own.shape == whole.shape and torch.equal(own.to_local(), expected)
        assert torch.equal(rows["a"].s, small.s) and rows["a"].shape == (7, 5)
        held = store["b"]  # keeps the file mapped
        assert resident(store.folder / "b.safetensors") < 1e6
        rows.factors = {"b": held}
        assert rows["b"].U.to_local().shape == (1_000_000, 4)
        assert 16e6 <= resident(store.folder / "b.safetensors") < 20e6, "a quarter of 64 MB"
        assert held.U.shape == (4_000_000, 4)
    finally:
        torch.distributed.destroy_process_group()


def resident(path: Path) -> int:
    """Bytes of a file that are in this process's memory."""
    sizes, here = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if "-" in line.split()[0] and ":" not in line.split()[0]:
            here = line.endswith(str(path))
        elif here and line.startswith("Rss:"):
            sizes += 1024 * int(line.split()[1])
    return sizes
