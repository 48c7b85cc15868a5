"""From recipe to merged folder on the embedded trio: identities, what the folder holds, replay, reuse of work."""

from __future__ import annotations

import importlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText, AutoProcessor

import vlmgraft as vg
from vlmgraft.distillation.distill import Distiller
from vlmgraft.errors import OutputError
from vlmgraft.hf.batches import Question, encode, load_questions
from vlmgraft.hf.models import load_processor, load_text_model, load_vlm
from vlmgraft.lab import world
from vlmgraft.pipeline import pair
from vlmgraft.recipe.model import dump_recipe
from vlmgraft.spectral.factor_store import FactorStore
from vlmgraft.spectral.gate_store import load_gates

WEIGHTS = "model.safetensors"


def recipe_of(trio: Path, method: dict[str, Any], **more: Any) -> dict[str, Any]:
    places = {"vlm": str(trio / "vlm"), "donor": str(trio / "donor"), "donor_base": str(trio / "base")}
    return {**places, "method": method, **more}


def recipe_for(trio: Path) -> Any:
    return vg.load_recipe(recipe_of(trio, {"name": "frism", "inject_weight": 0.1}))


@pytest.fixture(scope="module")
def calibration(image_calibration: Path) -> Path:
    return image_calibration


def frism_of(calibration: Path, **options: Any) -> dict[str, Any]:
    data = {"data": str(calibration), "samples": 16, "held_out": 8, "max_new_tokens": 8, "batch_size": 16}
    return {"name": "frism", "inject_weight": 0.1, "learning_rate": 0.2, "calibration": data, **options}


@pytest.fixture(scope="module")
def merged(trio: Path, calibration: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, Path]]:
    """A FRISM merge with a few steps, and its workdir."""
    folder = tmp_path_factory.mktemp("frism")
    vg.merge(recipe_of(trio, frism_of(calibration, steps=8)), folder / "merged", workdir=folder / "work")
    yield folder / "merged", folder / "work"


def test_public_functions_stay_functions_whatever_is_imported() -> None:
    package = importlib.import_module("vlmgraft.merging")
    assert all(callable(getattr(vg, name)) for name in vg.__all__)
    assert callable(package.merge_tensors)


def test_lambda_zero_is_the_vlm_byte_for_byte(trio: Path, tmp_path: Path) -> None:
    vg.merge(recipe_of(trio, {"name": "task_arithmetic", "scale": 0.0}), tmp_path / "same")
    vg.merge(recipe_of(trio, {"name": "task_arithmetic", "scale": 0.01}), tmp_path / "other")
    original = (trio / "vlm" / WEIGHTS).read_bytes()
    assert (tmp_path / "same" / WEIGHTS).read_bytes() == original
    assert (tmp_path / "other" / WEIGHTS).read_bytes() != original


def test_frism_at_lambda_zero_is_the_vlm_byte_for_byte(trio: Path, calibration: Path, tmp_path: Path) -> None:
    vg.merge(recipe_of(trio, frism_of(calibration, steps=0, scale=0.0)), tmp_path / "same")
    assert (tmp_path / "same" / WEIGHTS).read_bytes() == (trio / "vlm" / WEIGHTS).read_bytes()


@pytest.mark.parametrize("scale", [0.5, 1.5])
def test_zero_steps_are_task_arithmetic_at_half_lambda(
    scale: float, trio: Path, calibration: Path, tmp_path: Path
) -> None:
    """Both are W + λ/2 τ in float32, rounded once to bf16. Before that rounding FRISM's value is off by the float32
    error of its factors, at most a few ‖τ‖₂ · 2⁻²⁴ per element; so every value of the file must be the bf16 rounding of
    a number that near to the exact one. (Equality would be wrong to ask for: W and τ are bf16, so at λ/2 = ¼ or ¾ some
    percent of the exact values lie half-way between two bf16 numbers, where any error tips the rounding.)"""
    vg.merge(recipe_of(trio, frism_of(calibration, steps=0, scale=scale)), tmp_path / "frism")
    vg.merge(recipe_of(trio, {"name": "task_arithmetic", "scale": scale / 2}), tmp_path / "arithmetic")
    gated, plain = (load_file(tmp_path / name / WEIGHTS) for name in ("frism", "arithmetic"))
    vlm, donor, base = (load_file(trio / name / WEIGHTS) for name in ("vlm", "donor", "base"))
    assert list(gated) == list(plain) == list(vlm)
    pairs = {tensor.name: tensor.donor.names[0] for tensor in pair(recipe_for(trio)).merged if tensor.donor}
    for name in vlm.keys() - pairs.keys():
        assert torch.equal(gated[name], vlm[name]) and torch.equal(plain[name], vlm[name]), name
    for name, other in pairs.items():
        tau = donor[other].double() - base[other].double()
        exact = vlm[name].double() + scale / 2 * tau
        error = 8 * 2.0**-24 * (torch.linalg.matrix_norm(tau, 2) + exact.abs())
        low, high = (exact - error).bfloat16(), (exact + error).bfloat16()
        for merged in (gated[name], plain[name]):
            assert bool(((low <= merged) & (merged <= high)).all()), name
        assert float((gated[name] == plain[name]).float().mean()) > 0.9, name
        assert not torch.equal(gated[name], vlm[name]), name


def test_wide_open_gates_are_task_arithmetic_and_closed_ones_the_vlm(trio: Path, tmp_path: Path) -> None:
    from vlmgraft.methods.frism import GatedFold
    from vlmgraft.spectral.gates import constant_gates

    recipe = recipe_for(trio)
    store = vg.decompose(recipe, tmp_path / "factors")
    sizes = {name: len(store[name].s) for name in store}
    original, donor, base = (load_file(trio / name / WEIGHTS) for name in ("vlm", "donor", "base"))
    opened = GatedFold(store, constant_gates(sizes, float("inf"), 0.8))
    closed = GatedFold(store, constant_gates(sizes, float("-inf"), 0.8))
    rows = {tensor.name: tensor.donor.names[0] for tensor in pair(recipe).merged if tensor.donor}
    assert len(rows) == 28
    for name, other in rows.items():
        expected = original[name].float() + 0.8 * (donor[other].float() - base[other].float())
        torch.testing.assert_close(opened.matrix(name, original[name]), expected, rtol=1e-5, atol=2e-6)
        assert torch.equal(closed.matrix(name, original[name]).bfloat16(), original[name])


def test_reloaded_folder_gives_the_logits_of_the_gated_model(
    merged: tuple[Path, Path], trio: Path, calibration: Path
) -> None:
    """The folder's weights are rounded to bf16, the gated model's are not: logits differ by that rounding alone, which
    is small beside what the gates changed."""
    out, work = merged
    questions = load_questions(calibration, need_images=True)
    vlm, processor = load_vlm(trio / "vlm", torch.float32), load_processor(trio / "vlm")
    reloaded = AutoModelForImageTextToText.from_pretrained(out, dtype=torch.float32).eval()
    store, batch = FactorStore(work / "factors"), encode(processor, questions[:8])
    distiller = Distiller(vlm, processor, store, questions[:2], max_new_tokens=2)
    with torch.no_grad():
        before = vlm(**batch).logits
        with distiller.applied(load_gates(work / "gates")) as model:
            expected = model(**batch).logits
        found, after = reloaded(**batch).logits, vlm(**batch).logits
    keep = batch["attention_mask"].bool()
    change = (expected - before)[keep].norm()
    assert float((found - expected)[keep].norm()) < 0.05 * float(change)
    assert torch.equal(before, after), "nothing of the gates remains in the model"


def test_merged_folder_is_complete(merged: tuple[Path, Path], trio: Path) -> None:
    out, _ = merged
    beside = {path.name for path in (trio / "vlm").iterdir()}
    assert {path.name for path in out.iterdir()} == beside | {"README.md", "recipe.yaml", "receipt.json", "gates"}
    for name in beside - {WEIGHTS, "README.md"}:
        assert (out / name).read_bytes() == (trio / "vlm" / name).read_bytes(), name
    card = (out / "README.md").read_text()
    assert card.startswith("---\n") and "frism" in card
    before, after = load_file(trio / "vlm" / WEIGHTS), load_file(out / WEIGHTS)
    assert {name: (t.shape, t.dtype) for name, t in before.items()} == {n: (t.shape, t.dtype) for n, t in after.items()}
    visual = [name for name in before if "visual" in name]
    assert visual and all(torch.equal(before[name], after[name]) for name in visual)


def test_receipt_has_a_verdict_and_a_reason_for_every_tensor(merged: tuple[Path, Path], trio: Path) -> None:
    receipt = json.loads((merged[0] / "receipt.json").read_text())
    before, after = load_file(trio / "vlm" / WEIGHTS), load_file(merged[0] / WEIGHTS)
    assert sorted(row["name"] for row in receipt["tensors"]) == sorted(before)
    for row in receipt["tensors"]:
        assert row["verdict"] in ("merged", "kept", "excluded") and row["reason"]
        moved = float((after[row["name"]].float() - before[row["name"]].float()).norm())
        if row["verdict"] == "merged":
            assert moved == pytest.approx(row["added"], rel=0.05)  # the receipt's norm is taken before the cast
            assert row["sources"]["donor"] and row["task_vector"] > 0
        else:
            assert moved == row["added"] == 0
    assert receipt["method"] == "frism" and receipt["seconds"] > 0


@pytest.fixture(scope="module")
def replayed(merged: tuple[Path, Path], trio: Path, calibration: Path) -> Any:
    """The recipe in the merged folder, told where its sources are."""
    sources = [f"{key}={trio / name}" for key, name in (("vlm", "vlm"), ("donor", "donor"), ("donor_base", "base"))]
    return vg.load_recipe(merged[0] / "recipe.yaml", [*sources, f"method.calibration.data={calibration}"])


def test_recipe_in_the_folder_replays_to_the_same_weights(
    merged: tuple[Path, Path], replayed: Any, tmp_path: Path
) -> None:
    vg.merge(replayed, tmp_path / "again")
    assert (tmp_path / "again" / WEIGHTS).read_bytes() == (merged[0] / WEIGHTS).read_bytes()
    assert (tmp_path / "again" / "recipe.yaml").read_bytes() == (merged[0] / "recipe.yaml").read_bytes()
    assert [path.name for path in tmp_path.iterdir()] == ["again"], "the hidden workdir is gone"


def snapshot(folder: Path) -> dict[str, tuple[int, int]]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path): (path.stat().st_ino, path.stat().st_mtime_ns) for path in files}


def test_workdir_is_reused_for_the_same_inputs_only(
    merged: tuple[Path, Path], replayed: Any, trio: Path, calibration: Path, tmp_path: Path
) -> None:
    out, work = merged
    before = snapshot(work)
    assert any("factors" in name for name in before) and any("gates.safetensors" in name for name in before)
    vg.merge(replayed, tmp_path / "again", workdir=work)
    assert snapshot(work) == before
    assert (tmp_path / "again" / WEIGHTS).read_bytes() == (out / WEIGHTS).read_bytes()
    gates = (work / "gates" / "gates.safetensors").read_bytes()
    try:
        vg.merge(recipe_of(trio, frism_of(calibration, steps=4)), tmp_path / "other", workdir=work)
        after = snapshot(work)
        assert {n: after[n] for n in before if "factors" in n} == {n: before[n] for n in before if "factors" in n}
        assert (work / "gates" / "gates.safetensors").read_bytes() != gates, "another recipe learns its own gates"
    finally:
        vg.merge(replayed, tmp_path / "restored", workdir=work)


def test_stages_by_hand_equal_the_merge(merged: tuple[Path, Path], replayed: Any, tmp_path: Path) -> None:
    recipe = dump_recipe(replayed)
    vg.decompose(recipe, tmp_path / "factors")
    learned = vg.gates(recipe, tmp_path / "factors", tmp_path / "gates")
    whole = load_gates(merged[1] / "gates")
    assert all(torch.equal(learned.logits[name], whole.logits[name]) for name in whole.logits)
    assert float(torch.cat(list(learned.logits.values())).abs().max()) > 0.1, "the gates have moved"
    written = (tmp_path / "gates" / "gates.safetensors").stat().st_mtime_ns
    for name in ("gates.state", ".gates.state.99999.0.tmp"):  # as a kill after the rename leaves them
        (tmp_path / name).touch()
    (tmp_path / ".gates.partial-99999").mkdir()
    again = vg.gates(recipe, tmp_path / "factors", tmp_path / "gates")
    assert {path.name for path in tmp_path.iterdir()} == {"factors", "gates", "gates.teacher"}
    assert all(torch.equal(learned.logits[name], again.logits[name]) for name in whole.logits)
    assert (tmp_path / "gates" / "gates.safetensors").stat().st_mtime_ns == written, "found finished"
    with pytest.raises(OutputError, match="another recipe"):
        vg.gates(recipe, tmp_path / "factors", tmp_path / "gates", overrides=["method.seed=7"])


def test_gates_without_their_settings_are_no_gates_to_replace(tmp_path: Path) -> None:
    (tmp_path / "gates.safetensors").touch()
    with pytest.raises(OutputError, match="exists already; name another folder"):
        vg.gates({}, tmp_path / "factors", tmp_path)


def test_merged_folder_answers_through_auto_classes(merged: tuple[Path, Path]) -> None:
    processor = AutoProcessor.from_pretrained(merged[0])
    model = AutoModelForImageTextToText.from_pretrained(merged[0]).eval()
    assert model.dtype == torch.bfloat16
    rng = np.random.default_rng(4)
    item = world.draw_item(rng, "read")
    assert item.scene is not None
    image = world.render(rng, item.scene, "test")
    chat = [{"role": "user", "content": [{"type": "image", "image": image}, {"type": "text", "text": item.question}]}]
    batch = processor.apply_chat_template(
        chat, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    assert batch["input_ids"].tolist() == encode(processor, [Question(item.question, (image,))])["input_ids"].tolist()
    batch["pixel_values"] = batch["pixel_values"].to(model.dtype)
    out = model.generate(**batch, max_new_tokens=8, do_sample=False)
    said = processor.decode(out[0, batch["input_ids"].shape[1] :], skip_special_tokens=True)
    assert said.split() == item.answer.split()


def test_linear_takes_both_sides(trio: Path, tmp_path: Path) -> None:
    recipe = {key: str(trio / key) for key in ("vlm", "donor")}
    vg.merge({**recipe, "method": {"name": "linear", "vlm_weight": 0.75}, "layers": [2]}, tmp_path / "merged")
    merged, vlm, donor = (load_file(f / WEIGHTS) for f in (tmp_path / "merged", trio / "vlm", trio / "donor"))
    name = "model.layers.2.mlp.up_proj.weight"
    own = next(key for key in vlm if key.endswith(name.removeprefix("model.")))
    assert torch.equal(merged[own], (0.75 * vlm[own].float() + 0.25 * donor[name].float()).bfloat16())
    other = own.replace("layers.2", "layers.1")
    assert torch.equal(merged[other], vlm[other])
    assert load_text_model(trio / "donor").dtype == torch.bfloat16


def test_a_receipt_carries_what_the_method_says_per_layer(trio: Path, tmp_path: Path) -> None:
    recipe = {
        **recipe_of(trio, {"name": "frank", "visual_attention": [0.6, 0.4, 0.2, 0.1]}),
        "vlm_base": str(trio / "base"),
    }
    receipt = vg.merge(recipe, tmp_path / "merged")
    assert sum(note.startswith("frank, layer") for note in receipt.notes) == 4


def test_a_merge_in_float32_loads_in_float32(trio: Path, tmp_path: Path) -> None:
    recipe = recipe_of(trio, {"name": "task_arithmetic", "scale": 0.01}) | {"output": {"dtype": "float32"}}
    vg.merge(recipe, tmp_path / "out")
    loaded = AutoModelForImageTextToText.from_pretrained(tmp_path / "out")
    written, before = load_file(tmp_path / "out" / WEIGHTS), load_file(trio / "vlm" / WEIGHTS)
    assert {parameter.dtype for parameter in loaded.parameters()} == {torch.float32}
    wide = {name for name, value in written.items() if value.dtype == torch.float32}
    assert wide == {tensor.name for tensor in pair(recipe_for(trio)).merged}
    name = min(wide)
    loaded_value = next(
        v for n, v in loaded.named_parameters() if n.endswith(name.split("layers.")[1]) and "language" in n
    )
    assert torch.equal(loaded_value, written[name]) and not torch.equal(written[name], before[name].float())
