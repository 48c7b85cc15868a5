"""From recipes: several donors under one budget, and bad input that is named before any work."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import vlmgraft as vg
from vlmgraft.distillation import learn, teacher
from vlmgraft.errors import AlignmentError, CheckpointError, DataError, RecipeError, VlmgraftError
from vlmgraft.spectral.factor_store import JoinedStore, open_store
from vlmgraft.spectral.gate_store import load_gates
from vlmgraft.storage.jsonl import write_rows

LAYERS = "0-1"


def recipe_of(trio: Path, calibration: Path, donors: Any = None, bases: Any = None, **options: Any) -> dict[str, Any]:
    data = {"data": str(calibration), "samples": 12, "held_out": 8, "max_new_tokens": 4, "batch_size": 4}
    data |= options.pop("calibration", {})
    method = {"name": "frism", "steps": 6, "learning_rate": 0.3, "inject_weight": 0.1, "calibration": data, **options}
    method = {key: value for key, value in method.items() if value is not None}
    places = {"donor": donors or str(trio / "donor"), "donor_base": bases or str(trio / "base")}
    return {"vlm": str(trio / "vlm"), **places, "method": method, "layers": LAYERS}


@pytest.mark.filterwarnings("ignore:kl_budget is measured")
def test_gates_may_start_where_curvature_has_them(trio: Path, image_calibration: Path, tmp_path: Path) -> None:
    """Without a step they are the soft curvature gates, kept within reach and moved by one constant to the budget."""
    budget: dict[str, Any] = {"inject_weight": None, "kl_budget": 0.02, "start": "curvature"}
    vg.merge(recipe_of(trio, image_calibration, steps=0, **budget), tmp_path / "a", workdir=tmp_path / "start")
    first = load_gates(tmp_path / "start" / "gates")
    whole = torch.cat([*first.logits.values()])
    assert float(whole.std()) > 0.1 and float(whole.max() - whole.min()) <= 4 + 1e-5
    assert 0.97 * 0.02 <= first.settings["held_out_kl"] <= 0.02
    vg.merge(recipe_of(trio, image_calibration, steps=3, **budget), tmp_path / "b", workdir=tmp_path / "work")
    trained = load_gates(tmp_path / "work" / "gates")
    moves = torch.cat([trained.logits[name] - first.logits[name] for name in first.logits])
    assert 0 < float(moves.std()) <= 3 * 0.3 + 1e-3
    with pytest.raises(RecipeError, match=r"method\.start.*kl_budget"):
        vg.load_recipe(recipe_of(trio, image_calibration, start="curvature"))


@pytest.mark.filterwarnings("ignore:kl_budget is measured")
def test_two_donors_have_gates_each_and_one_budget(
    trio: Path, second: Path, image_calibration: Path, tmp_path: Path
) -> None:
    donors = [str(trio / "donor"), str(second)]
    recipe = recipe_of(trio, image_calibration, donors, inject_weight=None, kl_budget=0.02)
    receipt = vg.merge(recipe, tmp_path / "merged", workdir=tmp_path / "work")
    store, gates = open_store(tmp_path / "work" / "factors"), load_gates(tmp_path / "work" / "gates")
    assert isinstance(store, JoinedStore) and gates.factors == store.digest
    assert gates.settings["kl_budget"] == 0.02 and gates.settings["held_out_kl"] > 0
    vlm, merged = (load_file(folder / "model.safetensors") for folder in (trio / "vlm", tmp_path / "merged"))
    base = load_file(trio / "base" / "model.safetensors")
    taus = [load_file(Path(donor) / "model.safetensors") for donor in donors]
    for name, logits in gates.logits.items():
        halves, each = logits.chunk(2), len(store.stores[0][name].s)
        assert len(logits) == 2 * each and not torch.equal(*halves), "each donor's directions have gates of their own"
        role = next(key for key in base if name.endswith(key.removeprefix("model.")))
        for one, tau in zip(store.stores, taus, strict=True):
            expected = tau[role].float() - base[role].float()
            torch.testing.assert_close(one[name].update(), expected, rtol=1e-4, atol=1e-6)
        folded = vlm[name].float() + sum(
            one[name].update(half.sigmoid() * one[name].s) for one, half in zip(store.stores, halves, strict=True)
        )
        torch.testing.assert_close(merged[name].float(), folded.bfloat16().float(), rtol=2**-7, atol=1e-5)
    assert sum(row.verdict == "merged" for row in receipt.tensors) == 14
    moved = {
        **recipe_of(trio, image_calibration),
        "more_donors": [{"donor": donors[1], "donor_base": str(trio / "base")}],
    }
    overrides = [f"{key}={moved[key]}" for key in ("vlm", "donor", "donor_base", "more_donors")]
    again = vg.load_recipe(
        tmp_path / "merged" / "recipe.yaml", [*overrides, f"method.calibration.data={image_calibration}"]
    )
    assert [donor.donor for donor in again.more_donors] == donors[1:]
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "work").rglob("*")}
    vg.merge(again, tmp_path / "again", workdir=tmp_path / "work")
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "work").rglob("*")} == before
    swapped = recipe_of(trio, image_calibration, donors[::-1], inject_weight=None, kl_budget=0.02)
    with pytest.raises(CheckpointError, match="not of this recipe"):
        vg.gates(swapped, tmp_path / "work" / "factors", tmp_path / "gates")


def test_lists_of_donors_that_do_not_pair_are_refused(trio: Path, second: Path, image_calibration: Path) -> None:
    one, two, base = str(trio / "donor"), str(second), str(trio / "base")
    assert vg.load_recipe(recipe_of(trio, image_calibration, [one], [base])).more_donors == ()
    for donors, bases, message in (
        ([one, two], [base], "1 models for 2 donors"),
        (one, [base, base], "a list of 2 for one donor"),
        ([], base, "donor"),
    ):
        recipe = {**recipe_of(trio, image_calibration), "donor": donors, "donor_base": bases}
        with pytest.raises(RecipeError, match=message):
            vg.load_recipe(recipe)
    plain = {**recipe_of(trio, image_calibration, [one, two]), "method": {"name": "task_arithmetic"}}
    with pytest.raises(RecipeError, match="more_donors: several donors"):
        vg.load_recipe(plain)


def test_a_model_that_transformers_does_not_know_is_named(trio: Path, image_calibration: Path, tmp_path: Path) -> None:
    shutil.copytree(trio / "vlm", tmp_path / "vlm")
    config = json.loads((tmp_path / "vlm" / "config.json").read_text())
    (tmp_path / "vlm" / "config.json").write_text(json.dumps({**config, "model_type": "unheard_of"}))
    recipe = {**recipe_of(trio, image_calibration), "vlm": str(tmp_path / "vlm")}
    refuse(recipe, tmp_path, CheckpointError, "config.json is not one that transformers reads")


def refuse(recipe: dict[str, Any], tmp_path: Path, kind: type[VlmgraftError], message: str) -> None:
    """A merge is refused with this message, and leaves nothing behind."""
    before = {path.name for path in tmp_path.iterdir()}
    with pytest.raises(kind, match=message) as refused:
        vg.merge(recipe, tmp_path / "merged")
    assert refused.value.exit_code == 2
    assert {path.name for path in tmp_path.iterdir()} == before


def test_bad_questions_are_named_before_work(trio: Path, image_calibration: Path, tmp_path: Path) -> None:
    image = str(image_calibration.with_name("0.png"))
    (tmp_path / "broken.png").write_bytes(Path(image).read_bytes()[:80])
    cases: list[tuple[dict[str, Any], str]] = [
        ({"question": "read glyphs now"}, r'line 2: has no "image"; the calibration set must show images'),
        ({"question": "q", "image": "broken.png"}, r"line 2: image .*broken.png: cannot be read"),
        ({"question": "q", "image": "gone.png"}, r"line 2: image .*gone.png: missing"),
        ({"question": "sum " * 300, "image": image}, r"line 2: .*the model reads 256; shorten"),
        ({"question": " ", "image": image}, 'line 2: needs a "question"'),
    ]
    for row, message in cases:
        write_rows(tmp_path / "bad.jsonl", [{"question": "read glyphs now", "image": image}, row])
        refuse(recipe_of(trio, tmp_path / "bad.jsonl"), tmp_path, DataError, message)
    write_rows(tmp_path / "text.jsonl", [{"question": "sum 4 5 " * 100}])
    options = {"inject": "donor", "questions": str(tmp_path / "text.jsonl")}
    refuse(recipe_of(trio, image_calibration, **options), tmp_path, DataError, "the model reads 256; shorten")
    refuse(recipe_of(trio, tmp_path / "none.jsonl"), tmp_path, DataError, "no such question file")


def test_teachers_that_answer_nothing_are_refused_and_keep_the_factors(
    trio: Path, image_calibration: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ends = json.loads((trio / "vlm" / "generation_config.json").read_text())["eos_token_id"]
    end = ends if isinstance(ends, int) else ends[0]
    silent = lambda model, processor, asked, limit, options: ([[end]] * len(asked), [3] * len(asked))  # noqa: E731
    monkeypatch.setattr(teacher, "generate_batch", silent)
    with pytest.raises(DataError, match="answer is empty for 12 of 12 questions, first"):
        vg.merge(recipe_of(trio, image_calibration), tmp_path / "merged", workdir=tmp_path / "work")
    assert len(open_store(tmp_path / "work" / "factors")) == 14 and not (tmp_path / "merged").exists()


def test_factors_of_another_recipe_are_named_before_models_are_loaded(
    trio: Path, second: Path, image_calibration: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    vg.decompose(recipe_of(trio, image_calibration), tmp_path / "factors")
    monkeypatch.setattr("vlmgraft.distillation.loading.load_vlm", lambda *args: pytest.fail("a model was loaded"))
    for changed in (
        recipe_of(trio, image_calibration, str(second)),
        {**recipe_of(trio, image_calibration), "layers": "0-2"},
        {**recipe_of(trio, image_calibration), "modules": ["attention"]},
        recipe_of(trio, image_calibration, rank=8),
    ):
        with pytest.raises(CheckpointError, match=r"factors: model\.layers.*these factors are not of this recipe"):
            vg.gates(changed, tmp_path / "factors", tmp_path / "gates")
    with pytest.raises(CheckpointError, match="not a complete store of factors"):
        vg.gates(recipe_of(trio, image_calibration), tmp_path / "nothing", tmp_path / "gates")
    with pytest.raises(AlignmentError, match="donor"):
        vg.decompose(recipe_of(trio, image_calibration, [str(second), str(trio / "base")]), tmp_path / "same")
    assert not (tmp_path / "gates").exists()


def test_a_merge_is_one_process(
    trio: Path, image_calibration: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    refuse(recipe_of(trio, image_calibration), tmp_path, RecipeError, "merge runs in one process: run decompose")


def test_factors_are_made_by_all_processes_of_a_group(
    trio: Path, image_calibration: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []
    ordinary = learn.decompose

    def decompose(*given: Any, **options: Any) -> None:
        calls.append("decompose")
        ordinary(*given, **options)

    monkeypatch.setattr(learn, "join_group", lambda: calls.append("join_group"))
    monkeypatch.setattr(learn, "decompose", decompose)
    vg.decompose(recipe_of(trio, image_calibration, rank=2), tmp_path / "factors")
    assert calls == ["join_group", "decompose"], "who decides and waits is tested in spectral/test_decompose.py"
