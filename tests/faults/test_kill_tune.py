"""What kills leave of a fine-tuning, planted one by one: the next run takes what is whole and nothing else."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from jobs import Job, content

import vlmgraft as vg
from vlmgraft.errors import OutputError
from vlmgraft.finetuning import tune
from vlmgraft.finetuning.callback import DriftCallback
from vlmgraft.finetuning.trainer import whole_log
from vlmgraft.storage.jsonl import read_rows

pytestmark = pytest.mark.slow
STEPS = 3


class StoppedError(Exception):
    """Stands for a kill."""


@pytest.fixture(scope="module")
def recipe(small_jobs: dict[str, Callable[[Path], Job]]) -> dict[str, Any]:
    from vlmgraft.recipe.tune import dump_tune_recipe, load_tune_recipe

    found = dump_tune_recipe(load_tune_recipe(Path(small_jobs["tune"](Path()).arguments[1])))
    return found | {"train": found["train"] | {"max_steps": STEPS, "save_total_limit": 3}}


@pytest.fixture(scope="module")
def whole(recipe: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("whole") / "out"
    vg.tune(recipe, out)
    return out


@pytest.fixture
def stopped(recipe: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[int], Path]]:
    """Runs until a step begins; gives the folder it worked in."""

    def run(step: int) -> Path:
        begin = DriftCallback.on_step_begin

        def stop(self: Any, args: Any, state: Any, control: Any, **options: Any) -> None:
            if state.global_step == step:
                raise StoppedError
            begin(self, args, state, control, **options)

        with monkeypatch.context() as patched:
            patched.setattr(DriftCallback, "on_step_begin", stop)
            with pytest.raises(StoppedError):
                vg.tune(recipe, tmp_path / "out")
        return tmp_path / ".out.tune"

    yield run


def check(recipe: dict[str, Any], whole: Path, folder: Path) -> None:
    tuned = vg.tune(recipe, folder / "out", resume=True)
    found, expected = content(tuned.folder), content(whole)
    assert found.keys() == expected.keys()
    assert [name for name in found if found[name] != expected[name]] == []
    assert [path.name for path in folder.iterdir()] == ["out"]
    assert vg.verify(tuned.folder).faults == ()


@pytest.mark.parametrize("half", ["no state", "half a state", "state of another step"])
def test_a_checkpoint_half_written(half: str, recipe: Any, whole: Path, stopped: Any, tmp_path: Path) -> None:
    trainer = stopped(2) / "trainer"
    last = Path(shutil.copytree(trainer / "checkpoint-2", trainer / "checkpoint-3"))
    (last / "optimizer.pt").write_bytes((last / "optimizer.pt").read_bytes()[:1000])
    (last / ".tmpAbCdEf").touch()
    state = last / "trainer_state.json"
    if half == "no state":
        state.unlink()
    elif half == "half a state":
        state.write_bytes(state.read_bytes()[:-50])
    check(recipe, whole, tmp_path)


def test_before_the_first_checkpoint(recipe: Any, whole: Path, stopped: Any, tmp_path: Path) -> None:
    work = stopped(1)
    shutil.rmtree(work / "trainer" / "checkpoint-1")
    assert {row["step"] for row in read_rows(work / "drift.jsonl")} == {1}
    for name in ("saved", "side"):
        (work / name).mkdir()
        (work / name / "stray").touch()
    check(recipe, whole, tmp_path)


def test_after_the_rename(recipe: Any, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(whole, tmp_path / "out")
    (tmp_path / ".out.tune" / "saved").mkdir(parents=True)
    (tmp_path / ".out.partial-99999").mkdir()
    with monkeypatch.context() as patched:
        patched.setattr(tune, "_tune", lambda *_: pytest.fail("it is finished"))
        tuned = vg.tune(recipe, tmp_path / "out", resume=True)
    assert tuned.steps == STEPS and tuned.log and tuned.verdicts
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    with pytest.raises(OutputError, match="exists"):
        vg.tune({**recipe, "dtype": "bfloat16"}, tmp_path / "out", resume=True)


def test_the_loss_is_that_of_all_steps(whole: Path) -> None:
    rows = list(read_rows(whole / "training.jsonl"))
    losses = [row["loss"] for row in rows if "loss" in row]
    assert len(losses) == STEPS, "a row at every checkpoint"
    assert json.loads((whole / "receipt.json").read_text())["train_loss"] == pytest.approx(sum(losses) / STEPS)
    uneven = [{"step": 2, "loss": 1.0}, {"step": 2, "eval_loss": 9.0}, {"step": 3, "loss": 4.0}, {"step": 3, "x": 1}]
    assert whole_log(uneven)[-1] == {"step": 3, "x": 1, "train_loss": 2.0}
