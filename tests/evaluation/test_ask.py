"""Asking: every item once, whatever happens; bad items and failing models are counted, never lost."""

from __future__ import annotations

import random
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from vlmgraft.errors import DataError, VlmgraftError
from vlmgraft.evaluation.ask import ask, plan
from vlmgraft.evaluation.items import Item, Suite
from vlmgraft.evaluation.records import load_records, record_of
from vlmgraft.evaluation.summary import count, summarise
from vlmgraft.hf.batches import Question
from vlmgraft.storage.jsonl import drop_cut_line


def test_every_item_is_asked_once_in_batches_and_comes_back_in_order(scripted: Any, sums: Any, adds: Any) -> None:
    engine = scripted(adds)
    records = ask(engine, sums(23), batch_size=5)
    assert [record.id for record in records] == [str(n) for n in range(23)]
    assert sorted(engine.asked) == sorted(f"what is {n} + {n} ?" for n in range(23)) and max(engine.batches) == 5
    assert [record.score for record in records] == [float(n % 5 != 0) for n in range(23)]
    first = records[1]
    assert (first.answer, first.expected, first.verdict, first.tokens) == ("2", ("2",), "right", 7)
    assert first.prompt == "what is 1 + 1 ?" and first.output.startswith("<think>")


def test_batches_are_bounded_by_tokens_too_longest_first(scripted: Any, tmp_path: Path) -> None:
    """Prompts of 2 to 9 words, three at a time and at most 16 with padding, is 9 alone, 8 + 7, 6 + 5, 4 + 3 + 2."""
    items = tuple(Item(str(n), " ".join(["w"] * n), answers=("x",)) for n in (4, 9, 2, 7, 3, 6, 8, 5))
    engine, log = scripted(lambda question: "x"), tmp_path / "log"
    records = ask(engine, Suite("s", items), batch_size=3, batch_tokens=16, log=log)
    words = [len(text.split()) for text in engine.asked]
    assert words == [9, 8, 7, 6, 5, 4, 3, 2] and engine.batches == [1, 2, 2, 3]
    assert [record.id for record in records] == [item.id for item in items]
    again = scripted(lambda question: "x")
    assert ask(again, Suite("s", items), batch_size=3, batch_tokens=16, done=load_records(log)[:4]) == records
    assert again.batches == [1, 3], "5 is left of the batch of 6 and 5"
    assert ask(scripted(lambda question: "x"), Suite("s", items), batch_size=3) == records


def test_files_of_images_are_planned_by_their_size_and_text_apart(tmp_path: Path) -> None:
    """By the processor's count, here a token for 100 pixels; a file that cannot be read has its text alone."""
    planned: list[Any] = []

    class Sized:
        name = "sized"

        def lengths(self, questions: Any) -> list[int]:
            planned.extend(questions)
            return [1 + question.pixels // 100 for question in questions]

        def answer(self, questions: Any, seed: int) -> Any:
            asked.append([image.size for question in questions for image in question.images])
            raise VlmgraftError("no answer")

    asked: list[Any] = []
    sides = (10, 60, 20, 70, 30, 50)
    for side in sides:
        Image.new("RGB", (side, 10)).save(tmp_path / f"{side}.png")
    (tmp_path / "bad.png").write_text("no picture")
    items = [Item(str(side), "what?", (tmp_path / f"{side}.png",)) for side in sides]
    items += [Item("text", "what?"), Item("bad", "what?", (tmp_path / "bad.png",))]
    records = ask(Sized(), Suite("s", tuple(items)), batch_size=2)
    assert [question.pixels for question in planned] == [100, 600, 200, 700, 300, 500, 0, 0]
    pairs = [one for one in asked if len(one) == 2]
    assert pairs == [[(70, 10), (60, 10)], [(50, 10), (30, 10)], [(20, 10), (10, 10)]]
    assert records[-1].state == "not asked" and all(record.state == "failed" for record in records[:-1])


def test_without_lengths_batches_are_planned_by_what_is_seen(sums: Any) -> None:
    questions = [Question("w" * n) for n in (1, 3, 2)]
    assert plan(questions, (), 2, 1) == [[1, 2], [0]]
    assert plan(questions, [5, 1, 7], 2, 99) == [[2, 0], [1]]


def test_out_of_memory_halves_the_batch_and_all_are_answered(scripted: Any, sums: Any, adds: Any) -> None:
    engine = scripted(adds, room=3)
    assert ask(engine, sums(24), batch_size=8) == ask(scripted(adds), sums(24), batch_size=8)
    assert max(engine.batches) <= 3 and len(engine.asked) == 24


def test_one_item_that_fails_is_found_and_counts_as_wrong(scripted: Any, sums: Any, adds: Any) -> None:
    def say(question: Any) -> str:
        if question.question == "what is 7 + 7 ?":
            raise DataError("aspect ratio must be smaller than 200")
        return str(adds(question))

    records = ask(scripted(say), sums(12), batch_size=6)
    failed = records[7]
    assert (failed.state, failed.score, failed.fault) == ("failed", 0.0, "aspect ratio must be smaller than 200")
    assert sum(record.state == "scored" for record in records) == 11


def test_when_nothing_works_the_run_stops_early(scripted: Any, sums: Any) -> None:
    def say(question: Any) -> str:
        raise VlmgraftError("no such adapter")

    with pytest.raises(VlmgraftError, match=r"first 16 questions all failed.*no such adapter"):
        ask(scripted(say), sums(40), batch_size=8)


@pytest.mark.parametrize("error", [ValueError, RuntimeError, IndexError, KeyError, TypeError])
def test_a_mistake_of_ours_is_no_wrong_answer(scripted: Any, sums: Any, error: type[Exception]) -> None:
    def say(question: Any) -> str:
        raise error("ours")

    with pytest.raises(error, match="ours"):
        ask(scripted(say), sums(2))


def test_a_silent_model_is_wrong_and_shown(scripted: Any, sums: Any) -> None:
    counts = count(ask(scripted(lambda question: ""), sums(4)))
    assert (counts.right, counts.empty, counts.not_found, counts.scored) == (0, 4, 4, 4)


def test_a_loop_is_noticed_and_a_missing_answer_stays_unscored(scripted: Any) -> None:
    items = (Item("a", "q"), Item("b", "q", answers=("1",)))
    records = ask(scripted(lambda question: "again and " * 30), Suite("s", items))
    assert [record.verdict for record in records] == ["unscored", "wrong"]
    assert all(record.repeated for record in records)


def bomb(path: Path, side: int) -> None:
    """A PNG whose header promises side × side pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    path.write_bytes(
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 64)) + chunk(b"IEND", b"")
    )


@pytest.fixture
def pictures(tmp_path: Path) -> dict[str, Path]:
    """A good picture and every kind of bad one."""
    Image.new("RGB", (8, 8)).save(tmp_path / "good.png")
    whole = (tmp_path / "good.png").read_bytes()
    (tmp_path / "cut.png").write_bytes(whole[:40])
    (tmp_path / "text.png").write_text("no picture")
    (tmp_path / "nothing.png").write_bytes(b"")
    (tmp_path / "folder.png").mkdir()
    bomb(tmp_path / "bomb.png", 60_000)
    bomb(tmp_path / "large.png", 11_000)
    return {path.stem: path for path in tmp_path.glob("*.png")} | {"gone": tmp_path / "gone.png"}


@pytest.mark.parametrize(
    ("name", "fault"),
    [
        ("gone", "missing"),
        ("cut", "corrupt"),
        ("text", "corrupt"),
        ("nothing", "corrupt"),
        ("folder", "a folder"),
        ("bomb", "enormous"),
        ("large", "enormous"),
    ],
)
def test_bad_pictures_are_counted_and_the_rest_goes_on(
    scripted: Any, pictures: dict[str, Path], name: str, fault: str
) -> None:
    items = [Item(key, "what?", (path,), ("x",)) for key, path in pictures.items() if key in ("good", name)]
    records = {record.id: record for record in ask(scripted(lambda question: "x"), Suite("s", tuple(items)))}
    assert records["good"].verdict == "right"
    bad = records[name]
    assert (bad.state, bad.score) == ("not asked", None) and fault in bad.fault and pictures[name].name in bad.fault
    summary = summarise(list(records.values()))
    assert summary.counts.not_asked == 1 and list(summary.faults.values()) == [1]
    assert summary.tasks[0].score is not None and summary.tasks[0].score.mean == 1


def test_an_empty_question_is_not_asked(scripted: Any) -> None:
    engine = scripted(lambda question: "x")
    (record,) = ask(engine, Suite("s", (Item("a", "  ", answers=("x",)),), suffix="Answer."))
    assert record.state == "not asked" and "empty" in record.fault and not engine.asked


@pytest.mark.parametrize("seed", range(8))
def test_killed_at_any_byte_and_resumed_gives_the_same(
    scripted: Any, sums: Any, adds: Any, tmp_path: Path, seed: int
) -> None:
    suite, log = sums(40), tmp_path / "records.jsonl"
    whole = ask(scripted(adds), suite, batch_size=7, log=log)
    data = log.read_bytes()
    left = random.Random(seed).randrange(len(data))
    log.write_bytes(data[:left])
    drop_cut_line(log)
    kept = load_records(log)
    engine = scripted(adds)
    again = ask(engine, suite, batch_size=7, done=kept, log=log)
    assert again == whole and summarise(again) == summarise(whole)
    assert len(engine.asked) == 40 - len(kept) == 40 - data[:left].count(b"\n")
    assert {record.id for record in load_records(log)} == {item.id for item in suite.items}


def test_sampling_is_seeded_by_run_and_items(sums: Any) -> None:
    seeds: list[int] = []

    class Noted:
        name = "noted"

        def lengths(self, questions: Any) -> Any:
            return ()

        def answer(self, questions: Any, seed: int) -> Any:
            seeds.append(seed)
            raise VlmgraftError

    def drawn(seed: int) -> list[int]:
        seeds.clear()
        ask(Noted(), sums(2), batch_size=1, seed=seed)
        return list(seeds)

    assert drawn(0) == drawn(0) != drawn(1) and len(set(drawn(0))) == 2


def test_progress_reaches_the_end(scripted: Any, sums: Any, adds: Callable[..., str]) -> None:
    seen: list[tuple[int, int]] = []
    ask(scripted(adds), sums(9), batch_size=4, progress=lambda done, total, what: seen.append((done, total)))
    assert seen[-1] == (9, 9)


@pytest.mark.parametrize(
    ("output", "more", "score"),
    [
        ("4 + 5 = 9 ; 9 + 6 = 1", {}, 0.0),  # it may have gone on as 15
        ("Answer: 1", {}, 0.0),
        ("Answer: 1\nTo see why, add the digits, of which the first is", {}, 1.0),
        ("\\boxed{1} because", {}, 1.0),
        ("B. The second, because", {"choices": ("x", "1")}, 1.0),
        ("1", {"metric": "exact"}, 1.0),
    ],
)
def test_an_answer_that_the_limit_may_have_cut_does_not_count(output: str, more: dict[str, Any], score: float) -> None:
    item = Item("a", "q", answers=("1",), **more)
    found = record_of(item, "q", output, tokens=9, prompt_tokens=1, cut=True)
    assert (found.score, found.found) == (score, score == 1)
    assert record_of(item, "q", output, tokens=9, prompt_tokens=1, cut=False).score == 1.0
