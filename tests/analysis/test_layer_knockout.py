"""All cells from one loaded model, resumable, with changes paired by item."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from analysis_tools import LogitExam, bits, same_bits

from vlmgraft.alignment import Alignment
from vlmgraft.analysis.bench import Bench
from vlmgraft.analysis.in_memory import Rebuilder, StoredWeights, swapped, text_parameters
from vlmgraft.analysis.layer_knockout import Knockout, knockout, knockout_cells
from vlmgraft.checkpoint.index import open_checkpoint
from vlmgraft.errors import CheckpointError, OutputError, RecipeError
from vlmgraft.hf.batches import Question
from vlmgraft.methods.task_arithmetic import TaskArithmetic

MODES: Any = ("zero", "mean", "restore", "only")
PROMPTS = [Question("copy 1 2 3"), Question("copy 4 5 6")]


@pytest.fixture(scope="module")
def merged(vlm_model: Any, alignment: Alignment) -> Any:
    with Rebuilder(alignment) as rebuilder:
        weights = rebuilder.weights(TaskArithmetic(1.0))
    with swapped(text_parameters(vlm_model), weights):
        yield vlm_model


def run(
    model: Any, processor: Any, trio: Path, exam: LogitExam, out: Path, resume: bool = False, **options: Any
) -> list[dict[str, Any]]:
    with StoredWeights(open_checkpoint(trio / "vlm")) as vlm:
        cells = Knockout(Bench(model, processor, exam, out, {"model": "m"}, resume=resume), vlm=vlm, prompts=PROMPTS)
        return cells.run(modes=MODES, parts=("mlp",), **options)


def test_cells_are_every_layer_part_and_mode_once() -> None:
    cells = knockout_cells(range(4), both_models=True)
    keys = [tuple(cell.values()) for cell in cells]
    assert len(set(keys)) == len(keys) == 2 + 4 * 3 * 3 + 4 * 3 * 5
    assert [cell["mode"] for cell in cells[:2]] == ["intact", "intact"]
    alone = knockout_cells(range(4), both_models=False)
    assert {cell["model"] for cell in alone} == {"model"} and len(alone) == 1 + 4 * 3 * 3


def test_an_interrupted_run_goes_on_and_gives_the_same_rows(
    merged: Any, processor: Any, trio: Path, tmp_path: Path
) -> None:
    whole_exam, before = LogitExam(), bits(merged)
    whole = run(merged, processor, trio, whole_exam, tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        run(merged, processor, trio, LogitExam(fail_at=12), tmp_path / "cut")
    assert same_bits(merged, before)
    file = tmp_path / "cut" / "knockout.jsonl"
    file.write_text(file.read_text() + '{"model": "merg')  # a line cut short
    with pytest.raises(OutputError, match="--resume"):
        run(merged, processor, trio, LogitExam(), tmp_path / "cut")
    rest = LogitExam()
    assert run(merged, processor, trio, rest, tmp_path / "cut", resume=True) == whole
    assert rest.calls == whole_exam.calls - 11
    assert (tmp_path / "whole" / "knockout.jsonl").read_text() == file.read_text()


def test_rows_of_the_vlm_are_those_of_the_vlm_alone(
    merged: Any, processor: Any, trio: Path, alignment: Alignment, tmp_path: Path
) -> None:
    """The VLM's weights swapped into the merged model answer as the VLM loaded by itself."""
    rows = run(merged, processor, trio, LogitExam(), tmp_path / "both")
    with StoredWeights(open_checkpoint(trio / "vlm")) as stored:
        own = {role: stored[role].float() for role in stored}
    with swapped(text_parameters(merged), own):
        cells = Knockout(Bench(merged, processor, LogitExam(), tmp_path / "alone", {}), prompts=PROMPTS)
        alone = cells.run(modes=("zero", "mean"), parts=("mlp",))
    for row in alone:
        twin = next(r for r in rows if r["model"] == "VLM" and (r["layer"], r["mode"]) == (row["layer"], row["mode"]))
        assert twin["right"] == row["right"]
    intact = {row["model"]: row for row in rows if row["mode"] == "intact"}
    assert intact["VLM"]["right"] != intact["merged"]["right"]


def test_changes_are_paired_with_the_model_they_are_against(
    merged: Any, processor: Any, trio: Path, tmp_path: Path
) -> None:
    rows = run(merged, processor, trio, LogitExam(), tmp_path / "rows")
    intact = {row["model"]: row for row in rows if row["mode"] == "intact"}
    for row in (one for one in rows if one["mode"] != "intact"):
        assert row["against"] == ("VLM" if row["mode"] == "only" else row["model"])
        for kind, tasks in (("reasoning", ["sum"]), ("perception", ["colour", "read"])):
            marks = [np.mean([int(one) for one in row["right"][task]]) for task in tasks]
            before = [np.mean([int(one) for one in intact[row["against"]]["right"][task]]) for task in tasks]
            change = row[f"{kind}_change"]
            assert change["mean"] == pytest.approx(np.mean(marks) - np.mean(before))
            assert change["low"] <= change["mean"] <= change["high"]


def test_other_models_do_not_continue_a_folder(merged: Any, processor: Any, trio: Path, tmp_path: Path) -> None:
    run(merged, processor, trio, LogitExam(), tmp_path, layers=[0])
    with pytest.raises(OutputError, match="exam 'logits', not 'others'"):
        run(merged, processor, trio, LogitExam(label="others"), tmp_path, resume=True)


def test_refused_before_the_first_cell(vlm_model: Any, processor: Any, tmp_path: Path) -> None:
    exam = LogitExam()
    cells = Knockout(Bench(vlm_model, processor, exam, tmp_path, {}))
    with pytest.raises(RecipeError, match="needs prompts"):
        cells.run(modes=("mean",))
    with pytest.raises(RecipeError, match="layers 0 to 3"):
        cells.run(modes=("zero",), layers=[7])
    assert exam.calls == 0 and not any(tmp_path.iterdir())


def test_the_vlm_of_a_merged_folder_is_found_beside_it_or_asked_for(tmp_path: Path) -> None:
    (tmp_path / "merged").mkdir()
    (tmp_path / "vlm").mkdir()
    recipe = tmp_path / "merged" / "recipe.yaml"
    recipe.write_text("vlm: ../vlm\n")
    with pytest.raises(CheckpointError, match=str(tmp_path / "merged" / ".." / "vlm")):
        knockout(tmp_path / "merged", tmp_path / "out")
    recipe.write_text("vlm: ./elsewhere\n")
    with pytest.raises(RecipeError, match=r"recipe.yaml: its VLM was ./elsewhere, which is not here; .* --vlm"):
        knockout(tmp_path / "merged", tmp_path / "out")
