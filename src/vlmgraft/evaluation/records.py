"""One row per item asked, and its file: appended batch by batch, read again by a resumed run."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import TypeAdapter

from vlmgraft.errors import DataError
from vlmgraft.evaluation.answers import Verdict, read_final, repeats
from vlmgraft.evaluation.answers.text import storable
from vlmgraft.evaluation.answers.values import yes_or_no
from vlmgraft.evaluation.items import Item
from vlmgraft.evaluation.metrics import FREE_FORM, METRICS

RECORDS = "records.jsonl"
State = Literal["scored", "unscored", "failed", "not asked"]


@dataclass(frozen=True)
class Record:
    """The outcome of one item.

    state: scored; unscored (answered, but without a reference answer); failed (the model raised an error: counts as
    wrong); not asked (the item is invalid: listed, but not counted). score: in [0, 1], None unless scored or failed.
    tokens: of the answer, with the end token. cut: the token limit ended the answer. found: an answer could be read.
    repeated: the answer ends in a loop. images: the number of images shown.
    """

    id: str
    key: str
    task: str
    kind: str
    metric: str
    state: State
    prompt: str
    images: int
    output: str
    answer: str
    how: str
    expected: tuple[str, ...]
    choices: tuple[str, ...]
    score: float | None
    tokens: int
    prompt_tokens: int
    cut: bool
    found: bool
    repeated: bool
    category: str = ""
    group: str = ""
    part: str = ""
    pairing: str = ""
    fault: str = ""

    @property
    def verdict(self) -> str:
        """right, wrong, partly, or the state when there is no score."""
        if self.score is None:
            return self.state
        return "right" if self.score == 1 else "wrong" if self.score == 0 else "partly"

    @property
    def empty(self) -> bool:
        """Whether the model was asked and its answer is blank."""
        return self.state in ("scored", "unscored") and not self.output.strip()


_RECORD = TypeAdapter(Record)
"""Validates a record's JSON: missing fields and values of another type are errors, unknown fields are ignored."""


def record_of(item: Item, prompt: str, output: str, *, tokens: int, prompt_tokens: int, cut: bool) -> Record:
    """The record of an answered item, judged by the item's metric."""
    if item.answers:
        judged = METRICS[item.metric](output, item.expected)
        if cut and _unfinished(item, output):
            judged = Verdict("", 0.0, False, "none")
    else:
        answer, how = read_final(output)
        judged = Verdict(answer, 0.0, bool(answer), how)
    counts = {"tokens": tokens, "prompt_tokens": prompt_tokens, "cut": cut, "repeated": repeats(output)}
    reading = {"answer": judged.answer, "how": judged.how, "found": judged.found}
    state, score = ("scored", judged.score) if item.answers else ("unscored", None)
    return _record(item, state=state, score=score, prompt=prompt, output=output, **reading, **counts)


def _unfinished(item: Item, output: str) -> bool:
    """Whether the token limit may have cut the answer itself: a free-form number or text at the very end, outside a
    closed box or tag. "1" may be the beginning of "15"; the letter of a choice, yes and no are complete."""
    answer, how = read_final(output)
    stands = item.metric not in FREE_FORM or item.choices or how in ("box", "tag")
    return not stands and yes_or_no(answer) is None and output.rstrip().endswith(answer)


def fault_record(item: Item, fault: str, *, failed: bool) -> Record:
    """The record of an unanswered item: the model failed (score 0 if there is a reference), or the item is invalid."""
    score = 0.0 if failed and item.answers else None
    nothing: dict[str, Any] = {"prompt": item.question, "output": "", "answer": "", "how": "none", "score": score}
    nothing |= {"tokens": 0, "prompt_tokens": 0, "cut": False, "found": False, "repeated": False, "fault": fault}
    return _record(item, state="failed" if failed else "not asked", **nothing)


def _record(item: Item, **outcome: Any) -> Record:
    of_item = {name: getattr(item, name) for name in ("id", "key", "task", "kind", "metric", "category", "choices")}
    grouped = {"group": item.group, "part": item.part, "pairing": item.pairing}
    row: dict[str, Any] = {**of_item, **grouped, "images": len(item.images), "expected": item.answers, **outcome}
    row |= {name: storable(value) for name, value in row.items() if isinstance(value, str)}
    return Record(**row)


def load_records(path: str | Path) -> list[Record]:
    """The records of a file or an evaluation's folder, without a truncated last line. Raises DataError naming file and
    line."""
    path = Path(path) / RECORDS if Path(path).is_dir() else Path(path)
    if not path.is_file():
        raise DataError(f"{path}: no such file; it should hold the records of `vlmgraft evaluate`")
    lines = path.read_bytes().split(b"\n")
    records = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            records.append(_RECORD.validate_json(line, strict=True))
        except ValueError as error:
            if number == len(lines):
                break
            raise DataError(
                f"{path}, line {number}: no record of an evaluation ({error!s:.200}); take a whole copy of the folder"
            ) from error
    return records
