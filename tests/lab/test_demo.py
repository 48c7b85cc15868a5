"""The demo, on smaller grids: its files, its honesty, its merged checkpoint."""

from __future__ import annotations

from collections import Counter

import pytest

from vlmgraft.errors import CheckpointError, OutputError
from vlmgraft.lab import world
from vlmgraft.lab.compare import Sizes
from vlmgraft.lab.demo import FULL, QUICK, Settings, demo, mixed
from vlmgraft.lab.exam import draw_exam, save_questions
from vlmgraft.storage.jsonl import read_rows


@pytest.mark.slow
def test_demo_writes_a_table_a_picture_and_a_checkpoint_that_reasons(tmp_path):
    settings = Settings((0.25, 1.0), (0.25,), ((1.0, 0.1),), ((1.0, 3.0),), Sizes())
    demo(tmp_path / "demo", settings=settings, report=lambda line: None)
    rows = {(row["method"], row["setting"]): row for row in read_rows(tmp_path / "demo" / "results.jsonl")}
    by_method = {method: row for (method, _), row in rows.items()}
    vlm, merged = by_method["VLM"], by_method["merged folder, reloaded"]
    assert merged["reasoning"]["low"] > vlm["reasoning"]["high"]
    assert merged["perception"]["mean"] > vlm["perception"]["mean"] - 0.03
    assert by_method["FRISM, energy term"]["above_task_arithmetic_at_equal_kl"]["low"] > 0
    control = by_method["control: shuffled singular vectors"]
    assert control["reasoning"]["low"] <= vlm["reasoning"]["high"]
    assert control["above_task_arithmetic_at_equal_kl"]["high"] < 0
    table = (tmp_path / "demo" / "table.md").read_text()
    assert all(method in table for method in by_method)
    assert (tmp_path / "demo" / "tradeoff.png").stat().st_size > 10_000
    assert (tmp_path / "demo" / "merged" / "receipt.json").is_file()


@pytest.mark.parametrize("sizes", [FULL.sizes, QUICK.sizes])
def test_every_prefix_of_the_calibration_file_holds_all_kinds_of_question(tmp_path, sizes):
    """The tutorial learns from the first 64 rows and measures on the 128 after them."""
    exam = draw_exam(0, "calibration", dict.fromkeys(world.PERCEPTION, sizes.calibration // 4))
    file = save_questions(mixed(exam.questions), tmp_path / "calibration.jsonl")
    asked = [question.split()[1:3] for question in (row["question"] for row in read_rows(file))]
    kinds = [" ".join(words) for words in asked]
    assert len(kinds) == sizes.calibration
    for part in (kinds[:64], kinds[64:192]):
        counts = Counter(part)
        assert len(counts) == 4 and min(counts.values()) > len(part) / 8, counts


def test_demo_refuses_an_existing_folder_and_a_folder_without_a_trio(tmp_path):
    with pytest.raises(OutputError, match="exists"):
        demo(tmp_path)
    with pytest.raises(CheckpointError, match="no vlm folder"):
        demo(tmp_path / "demo", trio=tmp_path)
    assert not (tmp_path / "demo").exists()
