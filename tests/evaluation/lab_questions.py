"""Questions of the lab as a file, with rows that cannot be used, and how few of them are asked."""

from __future__ import annotations

import json
from pathlib import Path

from vlmgraft.lab.exam import draw_exam

SMALL = {"limit": 40, "batch_size": 8, "dtype": "float32", "max_new_tokens": 28}


def write_questions(folder: Path) -> Path:
    """Sums and colours of the lab as a file, with one bad row, one without an answer and one id that stands twice."""
    exam = draw_exam(5, "test", {"sum": 24, "colour": 8})
    rows = []
    for at, (item, question) in enumerate(zip(exam.items, exam.questions, strict=True)):
        question.images[0].save(folder / f"{at}.png")  # type: ignore[union-attr]
        kind = "reasoning" if item.task == "sum" else "perception"
        rows.append(
            {
                "question": question.question,
                "image": f"{at}.png",
                "answer": question.answer,
                "task": item.task,
                "kind": kind,
            }
        )
    rows[3]["image"] = "gone.png"
    del rows[4]["answer"]
    rows[5]["id"] = rows[6]["id"] = "twice"
    (folder / "q.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder / "q.jsonl"
