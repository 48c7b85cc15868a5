"""Spectral rules: what each one keeps, written out."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings, strategies as st

from vlmgraft.errors import RecipeError
from vlmgraft.methods import spectral as rules

S = torch.tensor([4.0, 2.0, 1.0, 1.0])
spectra = st.lists(st.floats(0.0625, 10, width=32), min_size=1, max_size=12).map(
    lambda s: torch.tensor(sorted(s, reverse=True))
)


def test_small_examples() -> None:
    assert rules.truncate(S, 2).tolist() == [4, 2, 0, 0]
    assert rules.truncate(S, {"energy": 0.8}).tolist() == [4, 2, 0, 0]  # 16, 20 of 22
    assert rules.truncate(S, "full").equal(S) and rules.truncate(S, 9).equal(S)
    assert rules.rank_k(S)[0].item() == pytest.approx(22**0.5) and rules.rank_k(S)[1:].tolist() == [0, 0, 0]
    assert rules.rank_k(S, 2).tolist() == pytest.approx([4 * 1.1**0.5, 2 * 1.1**0.5, 0, 0])  # 22 over 20
    assert rules.star(S, 0.75).tolist() == pytest.approx([16 / 3, 8 / 3, 0, 0])
    assert rules.star(S, 0.4).tolist() == [8, 0, 0, 0]
    assert rules.iso(S).tolist() == [2, 2, 2, 2]


@settings(max_examples=50, deadline=None)
@given(spectra, st.integers(1, 12), st.floats(0.05, 1))
def test_invariants(s: torch.Tensor, rank: int, eta: float) -> None:
    """rank_k keeps ‖s‖₂ and the ratios of what it keeps, star and iso the nuclear norm; nothing else closes."""
    before = s.clone()
    kept = rules.rank_k(s, rank)
    assert kept.norm().item() == pytest.approx(s.norm().item(), rel=1e-5) and not kept[rank:].any()
    torch.testing.assert_close(kept[:rank] / kept[0], s[:rank] / s[0])
    assert rules.star(s, eta).sum().item() == pytest.approx(s.sum().item(), rel=1e-5)
    assert rules.iso(s).sum().item() == pytest.approx(s.sum().item(), rel=1e-5)
    count = int((rules.star(s, eta) > 0).sum())
    assert s[: count - 1].double().sum() < eta * s.double().sum() or count == 1 or eta >= 1
    assert rules.truncate(s, rank)[:rank].equal(s[:rank]) and not rules.truncate(s, rank)[rank:].any()
    assert rules.rank_k(s, "full").equal(s)
    assert s.equal(before)


def test_the_largest_values_and_the_energy_do_for_rank_k() -> None:
    assert rules.rank_k(S[:2], "full", energy=22.0).equal(rules.rank_k(S, 2)[:2])


def test_a_zero_spectrum_stays_zero() -> None:
    zero = torch.zeros(3)
    for found in (rules.truncate(zero, 1), rules.rank_k(zero), rules.star(zero, 0.5), rules.iso(zero)):
        assert found.equal(zero)


def test_a_rank_that_is_none_is_refused() -> None:
    with pytest.raises(RecipeError, match="rank"):
        rules.truncate(S, 0)
