"""The stages of a merge with gates: a line for each, and what their questions and processor would be refused for."""

from __future__ import annotations

import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.recipe_place import Place
from vlmgraft import merge
from vlmgraft.costs import device, dry_run, fit, gate_stages, models
from vlmgraft.distillation import fits
from vlmgraft.errors import RecipeError
from vlmgraft.hf.batches import prompt_lengths
from vlmgraft.hf.models import load_processor
from vlmgraft.recipe.resolve import calibration_questions, read_recipe
from vlmgraft.spectral import decompose


def test_a_dry_run_has_a_line_for_every_stage_and_says_what_is_there(trio: Path, tmp_path: Path, vlmgraft: Any) -> None:
    place = Place(tmp_path, trio, "frism")
    work = tmp_path / "work"
    before = vlmgraft("merge", place.write(), "-o", place.out, "--workdir", work, "--dry-run", "--json")
    assert before.code == 0, before.err
    stages = {stage["name"]: stage for stage in json.loads(before.out)["stages"]}
    assert list(stages) == ["decompose", "answer", "learn", "fold"]
    assert not any(stage["done"] for stage in stages.values())
    assert stages["fold"]["disk"] == pytest.approx((trio / "vlm" / "model.safetensors").stat().st_size, rel=0.02)
    assert vlmgraft("decompose", place.write(), "-o", work / "factors", "-q").code == 0
    after = json.loads(vlmgraft("merge", place.write(), "-o", place.out, "--workdir", work, "--dry-run", "--json").out)
    assert "28 of 28" in after["stages"][0]["done"]


def test_a_dry_run_says_what_it_chose_and_what_the_rank_holds(trio: Path, tmp_path: Path, vlmgraft: Any) -> None:
    """The share in the dry run is of one layer; decompose and the receipt have all of them."""
    place = Place(tmp_path, trio, "frism")
    place.recipe["method"] |= {"rank": 16}
    rehearsed = json.loads(vlmgraft("merge", place.write(), "--dry-run", "--json").out)["notes"]
    assert any("without checkpointing" in note for note in rehearsed)
    about = next(re.search(r"rank 16 holds about ([\d.]+)% of ‖τ‖² \(in layer 2\)", note) for note in rehearsed
                 if note.startswith("rank"))  # fmt: skip
    assert about is not None
    printed = vlmgraft("decompose", place.write(), "-o", tmp_path / "factors").out
    whole = re.search(r"28 matrices, ([\d.]+)% of ‖τ‖²", printed)
    assert whole is not None and 10 < float(whole[1]) < 95
    assert float(about[1]) == pytest.approx(float(whole[1]), abs=15)
    ran = vlmgraft("merge", place.write(), "-o", place.out)
    assert f"the factors hold {whole[1]}% of ‖τ‖²; rank: full holds all" in ran.out


def no_questions(place: Place) -> tuple[list[str], list[str]]:
    (place.folder / "calibration.jsonl").unlink()
    return [], ["calibration.jsonl", "no such question file"]


def no_column(place: Place) -> tuple[list[str], list[str]]:
    (place.folder / "calibration.jsonl").write_text('{"prompt": "read", "image": "grey.png"}\n')
    return [], ["line 1", '"question"']


def no_image(place: Place) -> tuple[list[str], list[str]]:
    (place.folder / "grey.png").unlink()
    return [], ["grey.png"]


def no_processor(place: Place) -> tuple[list[str], list[str]]:
    (place.copy("vlm") / "processor_config.json").unlink()
    return [], ["calibration.jsonl, line 1", "the model reads text only"]


def no_gated_module(place: Place) -> tuple[list[str], list[str]]:
    place.recipe["modules"] = ["head"]
    return [], ["lm_head.weight", "leave it out of `modules`"]


def no_device(place: Place) -> tuple[list[str], list[str]]:
    return ["--device", "cuda:63"], ["cuda:63", "cpu"]


def too_few(place: Place) -> tuple[list[str], list[str]]:
    place.recipe["method"] |= {"kl_budget": 0.01}
    del place.recipe["method"]["inject_weight"]
    return [], ["has 4 questions", "method.calibration.samples"]


@pytest.mark.parametrize(
    "mistake",
    [no_questions, no_column, no_image, no_processor, no_gated_module, no_device, too_few],
    ids=lambda mistake: mistake.__name__,
)
def test_a_dry_run_finds_what_would_fail(mistake: Any, trio: Path, tmp_path: Path, vlmgraft: Any) -> None:
    place = Place(tmp_path, trio, "frism")
    more, parts = mistake(place)
    printed = place.refused(vlmgraft, more, parts)
    assert all(f"│ {stage} " in printed for stage in ("decompose", "answer", "learn", "fold")), "priced all the same"


def test_a_dry_run_tells_a_fault_before_what_takes_longer(
    trio: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place, told = Place(tmp_path, trio, "frism"), list[str]()
    no_questions(place)
    device_of, by_then = device.device_of, list[int]()
    monkeypatch.setattr(device, "device_of", lambda *one: (by_then.append(len(told)), device_of(*one))[1])
    rehearsed = dry_run.dry_run(place.write(), tell=told.append)
    assert by_then[0] == 1 and list(rehearsed.faults) == told
    assert rehearsed.notes[0] == "the questions were not read: 132 of 1000 tokens each are assumed"


def test_a_dry_run_reckons_with_the_longest_prompt_as_the_run_does(
    trio: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The longest is the third of four; both decide about layers in the host's memory by it."""
    place, works, steps = Place(tmp_path, trio, "frism"), list[Any](), list[dict[str, Any]]()
    rows = [
        {"question": f"read {'glyphs ' * (9 if number == 2 else 1)}now", "image": "grey.png"} for number in range(4)
    ]
    (place.folder / "calibration.jsonl").write_text("\n".join(map(json.dumps, rows)))
    fitting = fit.fitting
    monkeypatch.setattr(fit, "fitting", lambda model, work, *more: (works.append(work), fitting(model, work, *more))[1])
    rehearsed = dry_run.dry_run(place.write(), place.out)
    method, questions = read_recipe(place.write()).method, calibration_questions(read_recipe(place.write()).method)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(total_memory=1e12))
    monkeypatch.setattr(fits, "way_that_fits", lambda *_, **work: steps.append(work))
    fits.offloads(method, trio / "vlm", questions, torch.device("cuda"), torch.bfloat16)
    (work,), (step,), lengths = works, steps, prompt_lengths(load_processor(trio / "vlm"), questions)
    assert work.prompt == max(lengths) == lengths[2] > lengths[0]
    assert step["tokens"] == work.batch * (work.prompt + work.answer)
    parts = re.search(r"\(weights [\d.]+, factors .*, activations [\d.]+, logits [\d.]+\)", "".join(rehearsed.notes))
    assert parts is not None
    assert any(re.search(r"of host memory \([\d.]+ GB free\).* of disk \([\d.]+ GB free in", note)
               for note in rehearsed.notes)  # fmt: skip


@pytest.mark.parametrize("place_of", ["disk", "memory"])
def test_features_that_do_not_fit_are_refused_before_work(
    place_of: str, trio: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, vlmgraft: Any
) -> None:
    place = Place(tmp_path, trio, "frism")
    monkeypatch.setattr(decompose, "decompose", lambda *_, **__: pytest.fail("work was begun"))
    if place_of == "disk":
        monkeypatch.setattr(fits, "disk_of", lambda folder: (folder.parent, 1000))
        parts = ["gates.teacher: image features and answers take", "its disk has 0.00 GB free", "max_pixels"]
    else:
        monkeypatch.setattr(fits, "free_memory", lambda: 1000)
        parts = ["what the text model reads of all questions takes", "0.00 GB are free", "max_pixels, samples"]
    place.refused(vlmgraft, [], parts)
    with pytest.raises(RecipeError, match=parts[0]):
        merge(place.write(), place.out)


@pytest.mark.filterwarnings("ignore:kl_budget is measured on 2")
def test_a_dry_run_asks_for_as_many_questions_as_the_merge(trio: Path, tmp_path: Path, vlmgraft: Any) -> None:
    place = Place(tmp_path, trio, "frism")
    del place.recipe["method"]["inject_weight"]
    place.recipe["method"] |= {"kl_budget": 0.01}
    place.recipe["method"]["calibration"]["samples"] = 2
    assert vlmgraft("merge", place.write(), "--dry-run").code == 0, "two to learn on, two to measure on"
    assert vlmgraft("merge", place.write(), "-o", place.out, "-q").code == 0


@pytest.mark.parametrize(("host", "rank", "faults"), [(256e9, 64, 0), (256e9, "full", 0), (100e9, 64, 1)])
def test_a_dry_run_of_32b_on_one_card_puts_layers_into_the_hosts_memory(
    host: float, rank: Any, faults: int, trio: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the page-locked 512 + 64 + 16 MiB and so on of a layer's matrices: 106 GiB of 64 layers, before factors."""
    (model,) = (model for model in models.MODELS if model.name == "Qwen2.5-VL-32B")
    monkeypatch.setattr(models.Model, "of", lambda name, config: model)
    monkeypatch.setattr(device, "device_of", lambda *_: device.H100)
    monkeypatch.setattr(gate_stages, "free_memory", lambda: int(host))
    monkeypatch.setattr(gate_stages, "_prompt_lengths", lambda *_: [2000] * 4)
    place = Place(tmp_path, trio, "frism")
    place.recipe["method"] |= {"rank": rank, "steps": 200}
    rehearsed = dry_run.dry_run(place.write())
    said = next(note for note in rehearsed.notes if note.startswith("gates take"))
    found = re.search(r"offloaded \(else ([\d.]+) GiB, over nine tenths of it\): ([\d.]+) GiB of host memory", said)
    assert found is not None and float(found[1]) > 67 and float(found[2]) > 106
    answer, learn = rehearsed.stages[1:3]
    assert answer.name == "answer" and answer.host_memory == pytest.approx(106 * 2**30, rel=0.01)
    assert learn.name == "learn" and learn.host_memory == pytest.approx(float(found[2]) * 2**30, rel=0.01)
    assert learn.gpu_memory < 20 * 2**30 and learn.seconds > 2 * 200 * 62 / 48
    assert sum("GiB of host memory" in fault for fault in rehearsed.faults) == faults
