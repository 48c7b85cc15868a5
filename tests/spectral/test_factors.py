"""The store of factors: what is written is read back, and what is damaged or missing is named."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from vlmgraft.errors import CheckpointError
from vlmgraft.spectral.factors import Factors, FactorStore, factorize, join_donors


def example(name: str = "model.layers.0.mlp.up_proj.weight", seed: int = 0) -> Factors:
    tau = torch.randn(7, 5, generator=torch.Generator().manual_seed(seed))
    return factorize(tau, name, name.removeprefix("model."))


def test_a_matrix_survives_the_store_bit_for_bit(tmp_path: Path) -> None:
    factors, store = example(), FactorStore(tmp_path / "factors")
    store.save(factors, "d1")
    found = store.load(factors.name)
    assert found.U.equal(factors.U) and found.s.equal(factors.s) and found.Vh.equal(factors.Vh)
    assert (found.name, found.role, found.energy, found.error) == (
        factors.name,
        factors.role,
        factors.energy,
        factors.error,
    )
    assert [path.name for path in store.folder.iterdir()] == [f"{factors.name}.safetensors"], "no temporary file stays"


def test_the_training_copy_is_bfloat16_and_the_fold_reads_float32(tmp_path: Path) -> None:
    factors = example()
    FactorStore(tmp_path).save(factors, "d1", train_copy=True)
    low, full = FactorStore(tmp_path, training=True).load(factors.name), FactorStore(tmp_path).load(factors.name)
    assert low.U.dtype == low.Vh.dtype == torch.bfloat16 and low.s.dtype == torch.float32
    assert full.U.equal(factors.U) and low.U.equal(factors.U.bfloat16())


def test_the_manifest_makes_a_mapping_and_its_digest_follows_the_inputs(tmp_path: Path) -> None:
    store, names = FactorStore(tmp_path), ["model.layers.1.a.weight", "model.layers.0.a.weight"]
    with pytest.raises(CheckpointError, match="not a complete store"):
        len(store)
    for number, name in enumerate(names):
        store.save(example(name, number), f"digest{number}")
    store.finish(names, {"rank": "full"})
    assert list(store) == names and len(store) == 2 and names[0] in store and "other" not in store
    assert store[names[1]].s.equal(example(names[1], 1).s)
    before = store.digest
    store.save(example(names[0], 5), "digest5")
    store.finish(names, {"rank": "full"})
    assert store.digest != before
    store.reopen()
    with pytest.raises(CheckpointError, match="not a complete store"):
        len(store)


def test_damaged_and_missing_files_are_named(tmp_path: Path) -> None:
    store, factors = FactorStore(tmp_path), example()
    store.save(factors, "d")
    path = tmp_path / f"{factors.name}.safetensors"
    path.write_bytes(path.read_bytes()[:100])
    assert store.header(factors.name) is None
    with pytest.raises(CheckpointError, match=factors.name):
        store.load(factors.name)
    with pytest.raises(CheckpointError, match="other is missing"):
        store.finish(["other"], {})
    with pytest.raises(KeyError):
        store["other"]


def test_joined_donors_add_up_and_keep_a_gate_each() -> None:
    first, second = example("a", 1), example("a", 2)
    joined = join_donors([{"a": first}, {"a": second, "b": example("b", 3)}])
    assert torch.allclose(joined["a"].update(), first.update() + second.update(), atol=1e-5)
    only_second = torch.cat([torch.zeros(5), second.s])
    assert torch.allclose(joined["a"].update(only_second), second.update(), atol=1e-5)
    assert joined["b"].s.equal(example("b", 3).s) and joined["a"].energy == first.energy + second.energy
    with pytest.raises(CheckpointError, match="a: the donors' factors have shapes"):
        join_donors([{"a": first}, {"a": factorize(torch.ones(2, 2), "a", "a")}])
