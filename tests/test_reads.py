"""How often a FRISM merge opens what it reads: questions, images, donor and base once; no donor when all is ready."""

from __future__ import annotations

import os
import shutil
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import ImageFile as PillowFile
from safetensors.torch import load_file, save_file

import vlmgraft as vg
from vlmgraft.data.images import ImageFile, read_image
from vlmgraft.data.questions import Question, hold_images, open_images
from vlmgraft.errors import DataError, NumericalError
from vlmgraft.spectral import task_vector

WEIGHTS = "model.safetensors"
opened: Counter[str] = Counter()


def _count(event: str, args: tuple[Any, ...]) -> None:
    if event == "open" and isinstance(args[0], str | bytes | os.PathLike):
        opened[os.fsdecode(args[0])] += 1


sys.addaudithook(_count)  # a hook cannot be taken away again; this one only counts


@pytest.fixture
def models(trio: Path, tmp_path: Path) -> Path:
    """The trio, copied, so that it may be changed."""
    shutil.copytree(trio, tmp_path / "models")
    return tmp_path / "models"


@pytest.fixture
def recipe(models: Path, image_calibration: Path) -> dict[str, Any]:
    data = {"data": str(image_calibration), "samples": 16, "held_out": 8, "max_new_tokens": 4, "batch_size": 16}
    method = {"name": "frism", "inject_weight": 0.1, "steps": 1, "calibration": data}
    places = {"vlm": str(models / "vlm"), "donor": str(models / "donor"), "donor_base": str(models / "base")}
    return {**places, "method": method}


def opens_of(run: Callable[[], object], models: Path) -> Counter[str]:
    """Opens of each model's weights by its role, and of questions and images by file name, while `run` runs."""
    opened.clear()
    run()
    roles = {str(models / role / WEIGHTS): role for role in ("vlm", "donor", "base")}
    return Counter({roles.get(path, Path(path).name): count for path, count in opened.items()})


def test_everything_is_read_once_and_nothing_again_when_it_is_ready(
    models: Path, recipe: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(task_vector, "SETTLED", -1.0)  # the copies are a moment old
    work = tmp_path / "work"
    first = opens_of(lambda: vg.merge(recipe, tmp_path / "first", workdir=work), models)
    assert first["calibration.jsonl"] == 1
    assert [first[f"{number}.png"] for number in range(24)] == [1] * 24
    assert first["donor"] == first["base"] == 2  # the header, and the weights to decompose
    assert first["vlm"] <= 5  # the header, the check, the digest, the model, the fold
    second = opens_of(lambda: vg.merge(recipe, tmp_path / "second", workdir=work), models)
    assert second["donor"] == second["base"] == 1 and second["vlm"] == 2  # headers, and the VLM for the fold
    assert second["calibration.jsonl"] == 1 and second["0.png"] == 1
    assert (tmp_path / "first" / WEIGHTS).read_bytes() == (tmp_path / "second" / WEIGHTS).read_bytes()


def test_an_image_is_decoded_once_and_not_again_when_its_answer_is_there(
    recipe: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoded, load = Counter[bytes](), PillowFile.ImageFile.load

    def counted(image: PillowFile.ImageFile) -> Any:
        first, loaded = bool(image.tile), load(image)
        decoded.update([image.tobytes()] if first else [])
        return loaded

    monkeypatch.setattr(PillowFile.ImageFile, "load", counted)
    work = tmp_path / "work"
    vg.merge(recipe, tmp_path / "first", workdir=work)
    assert len(decoded) == decoded.total() == 24
    shutil.rmtree(work / "gates")
    vg.merge(recipe, tmp_path / "second", workdir=work)
    assert decoded.total() == 24
    assert (tmp_path / "first" / WEIGHTS).read_bytes() == (tmp_path / "second" / WEIGHTS).read_bytes()


@pytest.mark.parametrize("settled", [-1.0, 2.0])
def test_a_changed_source_is_noticed_although_size_and_time_are_the_old_ones(
    settled: float, models: Path, recipe: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(task_vector, "SETTLED", settled)
    work = tmp_path / "work"
    vg.merge(recipe, tmp_path / "before", workdir=work)
    vg.merge(recipe, tmp_path / "again", workdir=work)
    for role in ("donor", "vlm"):
        file = models / role / WEIGHTS
        stat, raw = file.stat(), bytearray(file.read_bytes())
        weights = load_file(file)
        name = next(name for name in weights if "up_proj" in name)
        weights[name] = weights[name] * 1.5
        save_file(weights, file, metadata={"format": "pt"})
        assert file.stat().st_size == len(raw)
        os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))
        digests = {path.name: path.read_bytes() for path in (work / "factors").glob("*.safetensors")}
        vg.merge(recipe, tmp_path / role, workdir=work)
        vg.merge(recipe, tmp_path / f"{role} afresh")
        assert (tmp_path / role / WEIGHTS).read_bytes() == (tmp_path / f"{role} afresh" / WEIGHTS).read_bytes()
        changed = [path for path in digests if (work / "factors" / path).read_bytes() != digests[path]]
        assert len(changed) == (role == "donor")


def test_a_touched_source_is_compared_and_nothing_is_computed_again(
    models: Path, recipe: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(task_vector, "SETTLED", -1.0)
    work = tmp_path / "work"
    vg.merge(recipe, tmp_path / "first", workdir=work)
    before = {path: path.stat().st_mtime_ns for path in work.rglob("*") if path.is_file()}
    for role in ("vlm", "donor", "base"):
        (models / role / WEIGHTS).touch()
    counts = opens_of(lambda: vg.merge(recipe, tmp_path / "second", workdir=work), models)
    assert counts["donor"] == counts["base"] == 2
    assert {path: path.stat().st_mtime_ns for path in before} == before


@pytest.mark.parametrize("role", ["vlm", "donor", "base"])
def test_a_weight_that_is_no_number_is_named_before_anything_is_learned(
    role: str, models: Path, recipe: dict[str, Any], tmp_path: Path
) -> None:
    file = models / role / WEIGHTS
    weights = load_file(file)
    name = next(name for name in weights if "down_proj" in name)
    weights[name][0, 0] = torch.inf
    save_file(weights, file, metadata={"format": "pt"})
    with pytest.raises(NumericalError, match=rf"down_proj.weight in .*/{role}/{WEIGHTS} .*holds NaN or infinity"):
        vg.merge(recipe, tmp_path / "out", workdir=tmp_path / "work")
    assert not (tmp_path / "work" / "gates").exists() and not (tmp_path / "work" / "gates.teacher").exists()


def test_images_beyond_the_budget_are_read_again_and_a_change_is_refused(image_calibration: Path) -> None:
    path = image_calibration.with_name("0.png")
    (kept,) = hold_images([Question("q", (path,))])
    (dropped,) = hold_images([Question("q", (path,))], budget=0)
    assert isinstance(dropped.images[0], ImageFile) and dropped.images[0].data is None and dropped == kept
    assert open_images(kept)[0].tobytes() == open_images(dropped)[0].tobytes()
    other = ImageFile(path, read_image(path.with_name("1.png"), "one", keep=False).digest)
    with pytest.raises(DataError, match=r"0\.png: changed while it was in use"):
        open_images(Question("q", (other,)))
