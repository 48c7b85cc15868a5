"""The script in docs/drift.md is short, and works."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

from vlmgraft.lab.exam import draw_exam
from vlmgraft.records import read_rows, write_rows

PAGE = Path(__file__).parents[1] / "docs" / "drift.md"


def test_the_script_in_the_docs_works(trio: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)[0]
    assert len([line for line in script.splitlines() if line.strip()]) <= 10
    for name in ("vlm", "donor"):
        (tmp_path / name).symlink_to(trio / name)
    exam, rows = draw_exam(0, "train", {"sum": 4}), []
    for number, (item, question) in enumerate(zip(exam.items, exam.questions, strict=True)):
        question.images[0].save(tmp_path / f"{number}.png")  # type: ignore[union-attr]
        rows.append({"image": f"{number}.png", "question": item.question, "answer": item.answer})
    write_rows(tmp_path / "traces.jsonl", rows)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    script = script.replace("num_train_epochs=3", "max_steps=1, logging_steps=1, use_cpu=True, report_to=[]")
    exec(compile(script, "docs/drift.md", "exec"), {"__name__": "script"})
    logged = list(read_rows(tmp_path / "tuned" / "drift.jsonl"))
    assert len(logged) == 16 and all(0 < row["push"] < 1 for row in logged)
    assert "trl" in sys.modules
