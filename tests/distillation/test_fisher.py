"""Scores of questions along singular directions, against sums written out, and the tokens that they are of."""

from __future__ import annotations

import pytest
import torch

from vlmgraft.distillation.distill import Distiller
from vlmgraft.distillation.fisher import draw_tokens, question_scores, tapped_scores
from vlmgraft.spectral.factors import Factors


def test_a_score_is_the_sum_written_out() -> None:
    generator = torch.Generator().manual_seed(0)
    x, delta, U, s, Vh = (
        torch.randn(*shape, generator=generator) for shape in ((2, 3, 4), (2, 3, 5), (5, 2), (2,), (2, 4))
    )
    scores = question_scores(x, delta, Factors("w", "w", U, s, Vh, 1.0, 0.0))
    for question in range(2):
        for i in range(2):
            expected = sum(
                float(delta[question, t] @ U[:, i]) * float(x[question, t] @ Vh[i]) * float(s[i]) for t in range(3)
            )
            assert float(scores[question, i]) == pytest.approx(expected, rel=1e-5)


def test_tokens_are_drawn_from_the_teachers_distribution() -> None:
    """10,000 draws from (.7, .2, .1): shares within four standard errors; the same generator gives the same tokens."""
    log_p = torch.tensor([0.7, 0.2, 0.1]).log().expand(10_000, 3)
    tokens = draw_tokens(log_p, torch.Generator().manual_seed(0))
    shares = tokens.bincount(minlength=3) / 10_000
    assert torch.allclose(shares, torch.tensor([0.7, 0.2, 0.1]), atol=4 * (0.25 / 10_000) ** 0.5)
    assert torch.equal(tokens, draw_tokens(log_p, torch.Generator().manual_seed(0)))


def test_taps_leave_no_hook_and_no_flag(distiller: Distiller) -> None:
    flags = [parameter.requires_grad for parameter in distiller.model.parameters()]
    with tapped_scores(distiller) as scored:
        rows = dict(scored(distiller.targets.batches[0], torch.Generator().manual_seed(0)))
    assert rows.keys() == distiller.factors.keys()
    assert all(score.shape == (12, len(distiller.factors[name].s)) for name, score in rows.items())
    assert [parameter.requires_grad for parameter in distiller.model.parameters()] == flags
    assert not any(linear._forward_hooks for linear in distiller.linears.values())
