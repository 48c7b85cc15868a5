"""The table of hand-made outputs, with the verdict a careful person gives."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from vlmgraft.evaluation.answers import judge

CASES = [json.loads(line) for line in Path(__file__).with_name("cases.jsonl").read_text(encoding="utf-8").splitlines()]


def test_the_table_is_large_and_has_both_verdicts() -> None:
    assert len(CASES) >= 150 and len({json.dumps(case) for case in CASES}) == len(CASES)
    assert min(sum(case["right"] is verdict for case in CASES) for verdict in (True, False)) >= 75


@pytest.mark.parametrize("case", CASES, ids=[f"{case['output'][:30]!r}~{case['expected'][:12]}" for case in CASES])
def test_verdict(case: dict[str, Any]) -> None:
    verdict = judge(case["output"], case["expected"], case.get("choices", ()), precision=case.get("precision"))
    assert verdict.score == float(case["right"]), (verdict, case.get("why"))
