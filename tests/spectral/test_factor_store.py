"""The store of factors: what is written is read back, and what is damaged or missing is named."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from vlmgraft.errors import CheckpointError
from vlmgraft.spectral import factor_store
from vlmgraft.spectral.factor_store import FactorStore, JoinedStore, check_gates, donor_folder, open_store
from vlmgraft.spectral.factors import Factors, factorize
from vlmgraft.spectral.gates import Gates


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
    assert store.kept == pytest.approx(1.0, rel=1e-5)
    before = store.digest
    store.save(example(names[0], 5), "digest5")
    store.finish(names, {"rank": "full"})
    assert store.digest != before
    store.reopen()
    with pytest.raises(CheckpointError, match="not a complete store"):
        len(store)


def test_a_truncated_store_says_what_share_of_the_energy_it_holds(tmp_path: Path) -> None:
    store = FactorStore(tmp_path)
    for name, spectrum in (("a", [3.0, 1.0]), ("b", [4.0, 2.0])):
        store.save(factorize(torch.diag(torch.tensor(spectrum)), name, name, 1), "digest")
    store.finish(["a", "b"], {"rank": 1})
    assert store.kept == pytest.approx((9 + 16) / (9 + 1 + 16 + 4), rel=1e-6)
    assert store.energies() == pytest.approx((25, 30))


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


def test_stores_of_several_donors_are_read_side_by_side(tmp_path: Path) -> None:
    """The second donor's store lies inside the first one's folder; a gate belongs to a direction of one donor."""
    factors = [example("a", 1), example("a", 2)]
    for number, donor in enumerate(factors):
        store = FactorStore(donor_folder(tmp_path, number))
        store.save(donor, f"digest{number}")
        store.finish(["a"], {"rank": "full"})
    both = open_store(tmp_path)
    assert isinstance(both, JoinedStore) and list(both) == ["a"] and len(both) == 1
    assert both["a"].s.equal(torch.cat([factors[0].s, factors[1].s]))
    assert both.digest != FactorStore(tmp_path).digest
    other = FactorStore(donor_folder(tmp_path, 1))
    other.save(example("b", 3), "digest3")
    other.finish(["a", "b"], {"rank": "full"})
    with pytest.raises(CheckpointError, match="b has factors of one donor only"):
        open_store(tmp_path)


def test_gates_of_other_factors_are_refused(tmp_path: Path) -> None:
    store = FactorStore(tmp_path)
    store.save(example("a"), "digest")
    store.finish(["a"], {"rank": "full"})
    check_gates(Gates({}, 1.0, factors=store.digest), store)
    check_gates(Gates({}, 1.0), store)
    check_gates(Gates({}, 1.0, factors="others"), {"a": example("a")})
    with pytest.raises(CheckpointError, match=f"{tmp_path}: the gates were made for factors others, these are"):
        check_gates(Gates({}, 1.0, factors="others"), store)


def test_a_mistake_of_ours_is_no_damaged_matrix(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise TypeError("ours")

    factors, store = example(), FactorStore(tmp_path)
    store.save(factors, "d1")
    monkeypatch.setattr(factor_store, "Factors", broken)
    with pytest.raises(TypeError, match="ours"):
        store.load(factors.name)
