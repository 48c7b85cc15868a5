"""Commands that are told to write where they must not: refused, and nothing is changed."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

import vlmgraft as vg
from vlmgraft.errors import OutputError
from vlmgraft.storage.jsonl import write_rows
from vlmgraft.storage.locks import locked
from vlmgraft.storage.publish import Publication

Run = Callable[..., Any]


@pytest.fixture
def models(trio: Path, tmp_path: Path) -> dict[str, str]:
    """Copies of the three models, as places that a recipe names."""
    for name in ("vlm", "donor", "base"):
        shutil.copytree(trio / name, tmp_path / name)
    return {"vlm": str(tmp_path / "vlm"), "donor": str(tmp_path / "donor"), "donor_base": str(tmp_path / "base")}


def recipe(folder: Path, models: dict[str, str], calibration: Path | None = None) -> Path:
    method: dict[str, Any] = {"name": "task_arithmetic"}
    if calibration is not None:
        asked = {"data": str(calibration), "samples": 4, "held_out": 2, "max_new_tokens": 4, "batch_size": 4}
        method = {"name": "frism", "steps": 0, "inject_weight": 0.1, "calibration": asked}
    file = folder / "recipe.yaml"
    file.write_text(yaml.safe_dump({**models, "method": method, "layers": "0"}))
    return file


def tree(folder: Path) -> dict[str, int]:
    return {str(path.relative_to(folder)): path.lstat().st_mtime_ns for path in folder.rglob("*")}


@pytest.mark.parametrize("out", ["vlm", "vlm/factors", "donor", "base", "."])
def test_decompose_never_writes_into_an_input(
    out: str, models: dict[str, str], image_calibration: Path, tmp_path: Path, vlmgraft: Run
) -> None:
    file, before = recipe(tmp_path, models, image_calibration), tree(tmp_path)
    ran = vlmgraft("decompose", file, "--out", tmp_path / out, "--resume", "--quiet")
    assert ran.code == 2 and "choose another" in ran.err, ran.err
    assert tree(tmp_path) == before | {"recipe.yaml": file.lstat().st_mtime_ns}


def test_decompose_resumes_no_folder_of_others(
    models: dict[str, str], image_calibration: Path, tmp_path: Path, vlmgraft: Run
) -> None:
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "letter.txt").write_text("dear")
    file = recipe(tmp_path, models, image_calibration)
    ran = vlmgraft("decompose", file, "--out", tmp_path / "home", "--resume", "--quiet")
    assert ran.code == 2 and "letter.txt, which this command did not write" in ran.err
    assert [path.name for path in (tmp_path / "home").iterdir()] == ["letter.txt"]


@pytest.mark.parametrize(
    ("work", "out"), [("out", "out"), ("vlm/work", "out"), (".", "out"), ("out/work", "out"), ("w", "w/gates")]
)
def test_a_workdir_is_apart_from_inputs_and_output(
    work: str, out: str, models: dict[str, str], image_calibration: Path, tmp_path: Path, vlmgraft: Run
) -> None:
    file, before = recipe(tmp_path, models, image_calibration), tree(tmp_path)
    ran = vlmgraft("merge", file, "--out", tmp_path / out, "--workdir", tmp_path / work, "--quiet")
    assert ran.code == 2 and "inside it" in ran.err, ran.err
    assert tree(tmp_path) == before | {"recipe.yaml": file.lstat().st_mtime_ns}


def test_the_kernels_folders(models: dict[str, str], image_calibration: Path, tmp_path: Path, vlmgraft: Run) -> None:
    file = recipe(tmp_path, models, image_calibration)
    for command in ("merge", "decompose"):
        ran = vlmgraft(command, file, "--out", "/proc/self/out", "--quiet")
        assert ran.code == 2 and "/proc/self/out" in ran.err and "kernel" in ran.err


def test_a_report_overwrites_pages_of_its_own_only(models: dict[str, str], tmp_path: Path, vlmgraft: Run) -> None:
    vg.merge(recipe(tmp_path, models), tmp_path / "merged")
    page, letter = tmp_path / "report.html", tmp_path / "letter.txt"
    letter.write_text("dear")
    assert vlmgraft("report", tmp_path / "merged", "--out", page).code == 0
    assert vlmgraft("report", tmp_path / "merged", "--out", page).code == 0
    for out in (letter, tmp_path / "merged" / "receipt.json", tmp_path / "merged"):
        ran = vlmgraft("report", tmp_path / "merged", "--out", out)
        assert ran.code == 2 and str(out) in ran.err, ran.err
    assert letter.read_text() == "dear" and json.loads((tmp_path / "merged" / "receipt.json").read_text())


@pytest.mark.parametrize("out", ["vlm", "vlm/c", ".", "home", "/proc/self/c", "letter.txt"])
def test_a_comparison_is_written_into_no_folder_of_others(
    out: str, models: dict[str, str], tmp_path: Path, vlmgraft: Run
) -> None:
    (tmp_path / "home").mkdir()
    for letter in (tmp_path / "home" / "letter.txt", tmp_path / "letter.txt"):
        letter.write_text("dear")
    before = tree(tmp_path)
    ran = vlmgraft("compare", models["vlm"], models["donor"], "--data", "lab", "--out", tmp_path / out, "--quiet")
    assert ran.code == 2 and str(tmp_path / out) in ran.err, ran.err
    assert tree(tmp_path) == before


def test_figures_and_recipes_replace_their_like_only(tmp_path: Path, vlmgraft: Run) -> None:
    score = {"mean": 0.5, "low": 0.4, "high": 0.6}
    setting = {"method": "task arithmetic", "kl": 0.0, "reasoning": score, "perception": score}
    rows = [setting | {"setting": f"λ {order}", "order": order} for order in (0.0, 1.0)]
    (tmp_path / "sweep").mkdir()
    write_rows(tmp_path / "sweep" / "sweep.jsonl", rows)
    words = ("report", tmp_path / "sweep", "--out", tmp_path / "r.html", "--figures", tmp_path / "figures")
    for _ in range(2):
        ran = vlmgraft(*words)
        assert ran.code == 0, ran.err
    figure = min((tmp_path / "figures").glob("*.pdf"))
    figure.write_bytes(b"%PDF-1.7\ndear")
    ran = vlmgraft(*words)
    assert ran.code == 2 and f"{figure}: exists, and this command did not write it" in ran.err
    assert figure.read_bytes() == b"%PDF-1.7\ndear"
    assert vlmgraft(*words[:-1], "/proc/self/figures").code == 2
    letter, link, made = tmp_path / "letter.txt", tmp_path / "link.yaml", tmp_path / "recipe.yaml"
    letter.write_text("dear")
    link.symlink_to(letter)
    for out in (letter, link, "/dev/full"):
        ran = vlmgraft("init", "--vlm", "a/b", "--donor", "c/d", "--donor-base", "e/f", "--out", out, "--force")
        assert ran.code == 2 and str(out) in ran.err, ran.err
    assert letter.read_text() == "dear"
    for force in ((), ("--force",)):
        ran = vlmgraft("init", "--vlm", "a/b", "--donor", "c/d", "--donor-base", "e/f", "--out", made, *force)
        assert ran.code == 0, ran.err


@pytest.mark.parametrize("key", ["vlm", "donor", "donor_base"])
def test_an_empty_name_is_not_this_folder(
    key: str, models: dict[str, str], tmp_path: Path, vlmgraft: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = recipe(tmp_path, {**models, key: ""})
    monkeypatch.chdir(models[key])
    ran = vlmgraft("merge", file, "--out", tmp_path / "out", "--quiet")
    assert ran.code == 2 and key in ran.err, ran.err
    ran = vlmgraft("evaluate", "", "--data", "lab", "--limit", "1", "--out", tmp_path / "out", "--quiet")
    assert ran.code == 2 and "name of a model is empty" in ran.err


def test_an_empty_name_is_no_data(trio: Path, tmp_path: Path, vlmgraft: Run) -> None:
    ran = vlmgraft("evaluate", trio / "vlm", "--data", "", "--out", tmp_path / "out", "--quiet")
    assert ran.code == 2 and "name of the data is empty" in ran.err


@pytest.mark.parametrize("kind", ["link", "second name", "FIFO", "text"])
def test_a_lock_file_that_is_something_else_is_left_alone(
    kind: str, models: dict[str, str], tmp_path: Path, vlmgraft: Run
) -> None:
    letter, lock = tmp_path / "letter.txt", tmp_path / ".out.lock"
    letter.write_text("dear")
    if kind == "link":
        lock.symlink_to(letter)
    elif kind == "second name":
        os.link(letter, lock)
    elif kind == "FIFO":
        os.mkfifo(lock)
    else:
        shutil.copy(letter, lock)
    ran = vlmgraft("merge", recipe(tmp_path, models), "--out", tmp_path / "out", "--quiet")
    assert ran.code == 2 and ".out" in ran.err and "remove it" in ran.err, ran.err
    assert letter.read_text() == "dear" and os.path.lexists(lock) and not (tmp_path / "out").exists()
    if kind == "link":
        with pytest.raises(OutputError), locked(tmp_path / "out", shared=True):
            pytest.fail("entered")


def test_a_partial_folder_that_is_a_link_is_not_emptied(tmp_path: Path) -> None:
    target = tmp_path / "photos"
    target.mkdir()
    (target / "one").write_text("1")
    (tmp_path / ".out.partial-key").symlink_to(target, target_is_directory=True)
    for anew in (True, False):
        with pytest.raises(OutputError, match="cannot be written"), Publication(tmp_path / "out", "key", anew=anew):
            pytest.fail("entered")
    assert [path.name for path in target.iterdir()] == ["one"]


def test_a_partial_folder_that_is_replaced_is_not_published(tmp_path: Path) -> None:
    with (
        pytest.raises(OutputError, match="was replaced while it was written"),
        Publication(tmp_path / "out", "key") as publication,
    ):
        publication.folder.rename(tmp_path / "aside")
        publication.folder.mkdir()
        (publication.folder / "planted").touch()
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("kind", ["link", "second name"])
def test_a_resumed_merge_writes_through_no_link(
    kind: str, models: dict[str, str], tmp_path: Path, vlmgraft: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A shard of the folder that an interruption left, replaced by another name of somebody's file."""
    file = recipe(tmp_path, models)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as inner:
        inner.setattr("vlmgraft.checkpoint.writer.Writer.finish", full)
        assert vlmgraft("merge", file, "--out", tmp_path / "out", "--quiet", "--resume").code == 2
    (partial,) = tmp_path.glob(".out.partial-*")
    (shard,) = partial.glob("*.safetensors")
    letter = tmp_path / "letter.txt"
    letter.write_bytes(shard.read_bytes())
    shard.unlink()
    shard.symlink_to(letter) if kind == "link" else os.link(letter, shard)
    before = letter.read_bytes()
    ran = vlmgraft("merge", file, "--out", tmp_path / "out", "--quiet", "--resume")
    assert ran.code == 2 and shard.name in ran.err and "is a link or no file" in ran.err
    assert letter.read_bytes() == before
