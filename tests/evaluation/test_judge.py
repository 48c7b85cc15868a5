"""A model as judge: asked once per answer, over HTTP, its verdicts beside the rules'."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.chat_server import chat_server, said
from vlmgraft.errors import InputError, VlmgraftError
from vlmgraft.evaluation.items import Item
from vlmgraft.evaluation.judge import Judge, agreement
from vlmgraft.evaluation.records import Record, record_of
from vlmgraft.evaluation.summary import summarise

Asked = list[dict[str, Any]]


@pytest.fixture
def endpoint() -> Iterator[tuple[str, Asked]]:
    """A server's address, and what it was asked."""
    asked: Asked = []

    def reply(body: dict[str, Any]) -> dict[str, Any]:
        asked.append(body)
        prompt = body["messages"][0]["content"]
        return said("Perhaps" if "fog" in prompt else "Yes." if "seven" in prompt else "no")

    with chat_server(reply) as url:
        yield url, asked


def record(name: str, output: str) -> Record:
    item = Item(name, "How many?", answers=("7",))
    return record_of(item, item.question, output, tokens=3, prompt_tokens=3, cut=False)


RECORDS = [record("a", "seven"), record("b", "It is 8"), record("c", "as seven or so as seven is"), record("d", "fog")]


def test_a_judge_is_asked_once_and_compared(endpoint: tuple[str, Asked], tmp_path: Path) -> None:
    url, asked = endpoint
    judge = Judge(url, "small", tmp_path / "judge.jsonl")
    verdicts = judge.verdicts(RECORDS)
    assert verdicts == {"a": True, "b": False, "c": True, "d": None}
    assert len(asked) == 4 and asked[0]["model"] == "small" and "7" in asked[0]["messages"][0]["content"]
    assert judge.verdicts(RECORDS) == verdicts and len(asked) == 4  # kept on disk
    assert replace(judge, model="large").verdicts(RECORDS[:1]) == {"a": True} and len(asked) == 5
    others = summarise(RECORDS, judged=verdicts).tasks[0].others
    agreed = sum((row.score == 1) == verdicts[row.id] for row in RECORDS[:3]) / 3
    assert others == {"judge's score": pytest.approx(2 / 3), "agreement with the judge": pytest.approx(agreed)}


def test_a_kept_verdict_that_was_cut_short_is_asked_for_again(endpoint: tuple[str, Asked], tmp_path: Path) -> None:
    url, asked = endpoint
    judge = Judge(url, "small", tmp_path / "judge.jsonl")
    verdicts = judge.verdicts(RECORDS)
    kept = judge.cache.read_bytes()
    judge.cache.write_bytes(kept[:-5])
    assert judge.verdicts(RECORDS) == verdicts and len(asked) == len(RECORDS) + 1
    assert judge.cache.read_bytes() == kept


def test_without_verdicts_nothing_stands_beside_the_score() -> None:
    assert agreement(RECORDS, {}) == {} and summarise(RECORDS).tasks[0].others == {}


@pytest.mark.parametrize(
    ("reply", "right"), [("**Yes**", True), ("No, it says 8", False), ("not sure", None), ("Yesterday", None)]
)
def test_a_verdict_is_the_word_yes_or_no(reply: str, right: bool | None, tmp_path: Path) -> None:
    with chat_server(lambda body: said(reply)) as url:
        assert Judge(url, "small", tmp_path / "j.jsonl").verdicts(RECORDS[:1]) == {"a": right}


def test_a_judge_that_says_nothing_is_named(tmp_path: Path) -> None:
    """A model that thinks first has no room for an answer; that is no verdict, and is not kept."""
    silent = {"choices": [{"message": {"content": None}}]}
    with chat_server(lambda body: silent) as url, pytest.raises(VlmgraftError, match="replied no text; does it think"):
        Judge(url, "small", tmp_path / "j.jsonl").verdicts(RECORDS[:1])
    assert not (tmp_path / "j.jsonl").exists()


def test_a_judge_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(VlmgraftError, match=r"small at http://127\.0\.0\.1:9/v1"):
        Judge("http://127.0.0.1:9/v1", "small", tmp_path / "judge.jsonl").verdicts(RECORDS)
    with pytest.raises(InputError, match="must begin with http"):
        Judge("file:///etc", "small", tmp_path / "judge.jsonl").verdicts(RECORDS)
