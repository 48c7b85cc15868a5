"""Summaries and paired comparisons of hand-made records."""

from __future__ import annotations

from dataclasses import replace
from math import comb
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from vlmgraft.errors import DataError
from vlmgraft.evaluation.items import Item
from vlmgraft.evaluation.paired import compare_records, comparison_table, mcnemar
from vlmgraft.evaluation.records import Record, fault_record, record_of
from vlmgraft.evaluation.summary import summarise, summary_table, units


def records(right: list[bool], task: str = "t", kind: Any = "reasoning", **more: Any) -> list[Record]:
    items = [Item(str(n), "q", answers=("17",), task=task, kind=kind, **more) for n in range(len(right))]
    said = ["17" if each else "18" for each in right]
    return [
        record_of(item, "q", text, tokens=2, prompt_tokens=1, cut=False) for item, text in zip(items, said, strict=True)
    ]


@settings(max_examples=40)
@given(st.integers(0, 40), st.integers(0, 40))
def test_mcnemar_is_the_binomial_test(lost: int, gained: int) -> None:
    """A fair coin's chance of a split of the discordant pairs at least as uneven, counted out."""
    total, distance = lost + gained, abs(lost - gained)
    extreme = sum(comb(total, heads) for heads in range(total + 1) if abs(total - 2 * heads) >= distance)
    assert mcnemar(lost, gained) == pytest.approx(extreme / 2**total)


@settings(max_examples=25)
@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=60))
def test_the_paired_difference(pairs: list[tuple[bool, bool]]) -> None:
    one, other = map(list, zip(*pairs, strict=True))
    (row,) = compare_records(records(one), records(other)).tasks
    assert row.difference.mean == pytest.approx(np.mean(other) - np.mean(one))
    assert row.difference.low <= row.difference.mean + 1e-12 and row.difference.mean <= row.difference.high + 1e-12
    assert (row.only_first, row.only_second) == (pairs.count((True, False)), pairs.count((False, True)))
    turned = compare_records(records(other), records(one)).tasks[0]
    assert turned.difference.mean == pytest.approx(-row.difference.mean) and turned.p == row.p


def test_pairing_narrows_the_interval() -> None:
    """Two models that differ on 5 of 100 items: the paired interval is far narrower than either score's."""
    base = [n % 2 == 0 for n in range(100)]
    better = [right or n < 10 for n, right in enumerate(base)]
    (row,) = compare_records(records(base), records(better)).tasks
    assert row.difference.low > 0 and row.difference.high - row.difference.low < 0.5 * (row.first.high - row.first.low)
    assert row.p == pytest.approx(2 / 2**5)


def test_averages_count_every_task_alike() -> None:
    one = [
        *records([True] * 90 + [False] * 10, "a"),
        *records([False] * 10, "b"),
        *records([True] * 5, "c", "perception"),
    ]
    found = compare_records(one, one, ("x", "y"))
    assert {row.name: row.first.mean for row in found.averages} == {
        "reasoning average": 0.45,
        "perception average": 1.0,
    }
    table = comparison_table(found)
    assert "| reasoning average | 45.0 [" in table and "+0.0 [+0.0, +0.0]" in table
    assert summarise(one).averages["reasoning"].mean == 0.45


def test_items_are_paired_by_id_and_what_one_lacks_is_counted() -> None:
    one, other = records([True, False, True]), records([False, False, True])[1:]
    found = compare_records(one, other)
    assert found.tasks[0].units == 2 and (found.only_in_first, found.only_in_second) == (1, 0)
    assert found.tasks[0].difference.mean == 0


def test_other_questions_under_one_id_are_refused() -> None:
    one = records([True])
    with pytest.raises(DataError, match="another question"):
        compare_records(one, [replace(one[0], key="other")])
    with pytest.raises(DataError, match="share no scored item"):
        compare_records(one, records([True], "another task"))


def test_partial_scores_have_no_mcnemar() -> None:
    one = records([True, False])
    other = [replace(one[0], score=0.6), one[1]]
    row = compare_records(one, other).tasks[0]
    assert row.p is None and row.difference.mean == pytest.approx(-0.2)


def test_unscored_and_unaskable_items_count_nowhere_but_failures_do() -> None:
    item = Item("x", "q", answers=("17",), task="t", kind="reasoning")
    found = [*records([True, True]), fault_record(item, "no picture", failed=False)]
    assert summarise(found).tasks[0].score is not None and summarise(found).tasks[0].score.mean == 1  # type: ignore[union-attr]
    failed = [*records([True, True]), fault_record(item, "out of memory", failed=True)]
    assert summarise(failed).tasks[0].score.mean == pytest.approx(2 / 3)  # type: ignore[union-attr]
    nothing = summarise([fault_record(item, "no picture", failed=False)])
    assert nothing.tasks[0].score is None and not nothing.averages and "| – |" in summary_table(nothing)


def test_wemath_is_scored_by_problem() -> None:
    parts = ["2steps_1", "2steps_2", "2steps_multi"]
    patterns = {"a": [1, 1, 1], "b": [1, 1, 0], "c": [0, 1, 1], "d": [0, 0, 0]}
    found: list[Record] = []
    for name, right in patterns.items():
        for record, part in zip(records([bool(each) for each in right]), parts, strict=True):
            found.append(replace(record, id=f"{name}/{part}", group=name, part=part, pairing="four_way"))
    assert units(found) == {"a": 1.0, "b": 0.5, "c": 0.0, "d": 0.0}
    task = summarise(found).tasks[0]
    assert task.measure == "strict score" and task.score is not None and task.score.mean == 0.375
    assert task.others["score_strict"] == 0.375 and task.others["score_loose"] == 0.625 and task.others["problems"] == 4


def test_hallusionbench_counts_questions_and_figures() -> None:
    found = records([True, True, True, False], metric="exact")
    groups = ["q0|f0", "q0|f1", "q1|f0", "q1|f1"]
    found = [replace(record, group=group, pairing="pairs") for record, group in zip(found, groups, strict=True)]
    assert summarise(found).tasks[0].others == {"question accuracy": 0.5, "figure accuracy": 0.5}


def test_dynamath_has_a_worst_case() -> None:
    found = [
        replace(record, group=str(at // 2), pairing="worst") for at, record in enumerate(records([True] * 3 + [False]))
    ]
    task = summarise(found).tasks[0]
    assert task.others == {"worst case": 0.5} and task.score is not None and task.score.mean == 0.75


def test_a_task_of_several_kinds_is_one_line_for_each() -> None:
    """One of perception and five of reasoning: the first model is right on 0/1 and 2/5, the second on 1/1 and 3/5."""
    names = "abcdef"

    def of_kinds(right: str) -> list[Record]:
        rows = records([mark == "1" for mark in right])
        kinds = ["perception", *["reasoning"] * 5]
        return [replace(row, id=name, kind=kind) for row, name, kind in zip(rows, names, kinds, strict=True)]

    first, second = of_kinds("011000"), of_kinds("111100")
    found = summarise(first)
    shown = [(task.task, task.kind, task.counts.items, task.score and task.score.mean) for task in found.tasks]
    assert shown == [("t (perception)", "perception", 1, 0.0), ("t (reasoning)", "reasoning", 5, pytest.approx(0.4))]
    assert {kind: average.mean for kind, average in found.averages.items()} == {
        "perception": 0.0,
        "reasoning": pytest.approx(0.4),
    }
    for other in (second, [replace(row, kind="reasoning") for row in second]):
        paired = compare_records(first, other)
        assert [(row.name, row.units, row.difference.mean) for row in paired.tasks] == [
            ("t (perception)", 1, 1.0),
            ("t (reasoning)", 5, pytest.approx(0.2)),
        ]
        assert [row.name for row in paired.averages] == ["reasoning average", "perception average"]
