"""POPE's F1 with its interval, and what the table says beside a score."""

from __future__ import annotations

import numpy as np
import pytest

from vlmgraft.evaluation.items import Item
from vlmgraft.evaluation.records import Record, record_of
from vlmgraft.evaluation.summary import summarise, summary_table


def stances(pairs: list[tuple[str, str]]) -> list[Record]:
    """Records of yes/no questions, from (answer, truth)."""
    items = [Item(str(n), "q ?", answers=(truth,), metric="yes_no", task="pope") for n, (_, truth) in enumerate(pairs)]
    return [
        record_of(item, "q ?", answer, tokens=2, prompt_tokens=1, cut=False)
        for item, (answer, _) in zip(items, pairs, strict=True)
    ]


def test_f1_is_counted_and_its_interval_is_as_wide_as_a_plain_bootstraps() -> None:
    """30 true positives, 10 misses, 20 false alarms, 40 true negatives: F1 = 60 / (50 + 40)."""
    pairs = [("yes", "yes")] * 30 + [("no", "yes")] * 10 + [("yes", "no")] * 20 + [("no", "no")] * 40
    figures = summarise(stances(pairs)).tasks[0].others
    assert figures["F1"] == pytest.approx(60 / 90) and figures["precision"] == pytest.approx(0.6)
    rng = np.random.default_rng(7)
    counts = rng.multinomial(100, [0.3, 0.1, 0.2, 0.4], size=4000)
    low, high = np.quantile(2 * counts[:, 0] / (2 * counts[:, 0] + counts[:, 1] + counts[:, 2]), [0.025, 0.975])
    assert (figures["F1 low"], figures["F1 high"]) == (pytest.approx(low, abs=0.02), pytest.approx(high, abs=0.02))


def test_f1_of_one_answer_says_nothing() -> None:
    figures = summarise(stances([("yes", "yes")])).tasks[0].others
    assert (figures["F1"], figures["F1 low"], figures["F1 high"]) == (1, 0, 1)


def test_all_right_is_no_certainty() -> None:
    table = summary_table(summarise(stances([("yes", "yes"), ("no", "no")] * 10)))
    assert "| 100.0 [83.9, 100.0] |" in table, "Wilson: 20 / (20 + 1.96²)"
