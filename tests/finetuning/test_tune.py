"""`vlmgraft tune`: from recipe and traces to a finished folder."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import vlmgraft as vg
from experiments.lab import tasks
from tests.finetuning.lab_traces import recipe_on, write_traces
from vlmgraft.checkpoint.index import open_checkpoint
from vlmgraft.errors import AlignmentError, CheckpointError, OutputError, RecipeError
from vlmgraft.finetuning import tune
from vlmgraft.hf.models import load_processor, load_vlm
from vlmgraft.lab.exam import draw_exam
from vlmgraft.recipe.tune import dump_tune_recipe, load_tune_recipe
from vlmgraft.spectral.gate_store import save_gates
from vlmgraft.spectral.gates import constant_gates
from vlmgraft.storage.jsonl import read_rows, write_rows

Q0 = "model.layers.0.self_attn.q_proj.weight"


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_traces(tmp_path_factory.mktemp("traces"))


@pytest.fixture
def recipe(trio: Path, data: Path) -> dict[str, Any]:
    return recipe_on(trio, data)


def test_a_finished_folder(recipe: Any, trio: Path, tmp_path: Path, vlmgraft: Callable[..., Any]) -> None:
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    arguments = ("--set", "prior.strength=2", "--set", "train.report_to=tensorboard")
    ran = vlmgraft("tune", tmp_path / "recipe.yaml", "--out", tmp_path / "out", *arguments)
    assert ran.code == 0 and "3 steps" in ran.out and "16 tensors pushed" in ran.out, ran.err
    before, after = (load_file(folder / "model.safetensors") for folder in (trio / "vlm", tmp_path / "out"))
    assert list(before) == list(after)
    assert all(before[name].dtype == after[name].dtype for name in before)
    moved = {name for name in before if not before[name].equal(after[name])}
    assert Q0 in moved and not any(name.startswith("visual") for name in moved)
    receipt = json.loads((tmp_path / "out" / "receipt.json").read_text())
    assert receipt["steps"] == 3 and len(receipt["prior"]) == len(before)
    rows = list(read_rows(tmp_path / "out" / "drift.jsonl"))
    assert {row["step"] for row in rows} == {1, 2, 3} and all(row["push"] <= 2 for row in rows)
    (events,) = tmp_path.joinpath("out", "runs").rglob("*tfevents*")
    assert {"train/loss", "train/drift_cos_attention"} <= set(EventAccumulator(str(events)).Reload().Tags()["scalars"])
    for file in ("config.json", "chat_template.jinja", "tokenizer.json", "processor_config.json"):
        assert (tmp_path / "out" / file).read_bytes() == (trio / "vlm" / file).read_bytes()
    moved = [f"{key}={trio / folder}" for key, folder in (("vlm", "vlm"), ("donor", "donor"), ("donor_base", "base"))]
    moved.append(f"data.train={recipe['data']['train']}")
    replayed = load_tune_recipe(tmp_path / "out" / "recipe.yaml", moved)
    assert replayed.prior.strength == 2 and load_tune_recipe(dump_tune_recipe(replayed)) == replayed
    assert not list(tmp_path.glob(".out*"))
    exam = draw_exam(0, "validation", {"colour": 4})
    marks = exam.mark(load_vlm(tmp_path / "out", torch.float32), load_processor(tmp_path / "out"))
    assert len(marks.outputs) == 4


def test_without_a_prior_it_is_the_trainer_alone(recipe: Any, tmp_path: Path) -> None:
    """Strength 0 pushes by nothing: the same weights as with mode none, which needs no donor."""
    plain = {key: value for key, value in recipe.items() if not key.startswith("donor")}
    vg.tune({**plain, "prior": "none"}, tmp_path / "a")
    vg.tune({**recipe, "prior": {"strength": 0}}, tmp_path / "b")
    pushed = vg.tune({**recipe, "prior": {"strength": 1, "delta": "base"}}, tmp_path / "c")
    one, other, third = (load_file(tmp_path / name / "model.safetensors") for name in "abc")
    assert all(one[name].equal(other[name]) for name in one)
    assert not one[Q0].equal(third[Q0])
    assert pushed.folder == tmp_path / "c" and pushed.steps == 3
    assert sum(verdict.verdict == "pushed" for verdict in pushed.verdicts) == 16


def test_an_interrupted_run_goes_on(recipe: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = {**recipe, "train": recipe["train"] | {"save_steps": 1}}
    vg.tune(settings, tmp_path / "whole")
    from vlmgraft.finetuning.callback import DriftCallback

    step_begin = DriftCallback.on_step_begin

    def interrupted(self: Any, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 2:
            raise KeyboardInterrupt
        step_begin(self, args, state, control, **kwargs)

    with monkeypatch.context() as patched:
        patched.setattr(DriftCallback, "on_step_begin", interrupted)
        with pytest.raises(KeyboardInterrupt):
            vg.tune(settings, tmp_path / "parts")
    assert not (tmp_path / "parts").exists()
    with pytest.raises(OutputError, match="another recipe"):
        vg.tune({**settings, "prior": {"strength": 0.5}}, tmp_path / "parts", resume=True)
    traces = Path(settings["data"]["train"])
    rows, picture = list(read_rows(traces)), (traces.parent / "traces-0000.png").read_bytes()
    write_rows(traces, rows[::-1])
    with pytest.raises(OutputError, match="other contents of train"):
        vg.tune(settings, tmp_path / "parts", resume=True)
    write_rows(traces, rows)
    (traces.parent / "traces-0000.png").write_bytes((traces.parent / "traces-0001.png").read_bytes())
    with pytest.raises(OutputError, match="other contents of train"):
        vg.tune(settings, tmp_path / "parts", resume=True)
    (traces.parent / "traces-0000.png").write_bytes(picture)
    tuned = vg.tune(settings, tmp_path / "parts", resume=True)
    assert tuned.steps == 3
    assert vg.tune(settings, tmp_path / "parts", resume=True).steps == 3, "finished already"
    write_rows(traces, rows[::-1])
    with pytest.raises(OutputError, match="exists"):
        vg.tune(settings, tmp_path / "parts", resume=True)
    write_rows(traces, rows)
    one, other = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "parts"))
    assert all(one[name].equal(other[name]) for name in one)
    rows = list(read_rows(tmp_path / "parts" / "drift.jsonl"))
    assert [row["step"] for row in rows if row["tensor"] == Q0] == [1, 2, 3]


def test_the_recipe_filters_by_a_gates_folder(recipe: Any, tmp_path: Path) -> None:
    places = {key: recipe[key] for key in ("vlm", "donor", "donor_base")}
    store = vg.decompose({**places, "method": "frism", "modules": ["*.q_proj.weight"]}, tmp_path / "factors")
    gates = constant_gates({name: len(store[name].s) for name in store}, 0.0, 1.0)
    save_gates(replace(gates, factors=store.digest), tmp_path / "gates")
    read = load_tune_recipe({**recipe, "prior": {"gates": str(tmp_path / "gates"), "schedule": "linear"}})
    prior = tune._prior(read, open_checkpoint(recipe["vlm"]))
    assert prior is not None and set(prior.deltas) == set(store) and prior.rule.schedule == "linear"
    half = store[Q0].update() / 2
    assert (prior.deltas[Q0].value.float() - half).norm() < 1e-2 * half.norm()
    with pytest.raises(CheckpointError, match="not of a complete gates folder"):
        vg.tune({**recipe, "prior": {"gates": str(tmp_path / "none")}}, tmp_path / "out")


@pytest.mark.parametrize("merged", [False, True])
def test_lora(recipe: Any, trio: Path, tmp_path: Path, merged: bool) -> None:
    vg.tune({**recipe, "lora": {"r": 2}, "merge_adapter": merged}, tmp_path / "out")
    receipt = json.loads((tmp_path / "out" / "receipt.json").read_text())
    assert sum(row["verdict"] == "pushed" for row in receipt["prior"]) == 16
    if not merged:
        from peft import PeftModel

        model = PeftModel.from_pretrained(load_vlm(trio / "vlm", torch.float32), str(tmp_path / "out"))
        assert any(value.abs().max() > 0 for name, value in model.named_parameters() if "lora_B" in name)
        return
    before, after = (load_file(folder / "model.safetensors") for folder in (trio / "vlm", tmp_path / "out"))
    assert list(before) == list(after)
    assert {name for name in before if not before[name].equal(after[name])} <= {
        name for name in before if name.endswith("_proj.weight") and not name.startswith("visual")
    }


def test_new_tokens_are_published(recipe: Any, trio: Path, tmp_path: Path) -> None:
    settings = {**recipe, "data": recipe["data"] | {"add_tokens": ["<plan>"]}}
    with pytest.raises(RecipeError, match="modules_to_save"):
        vg.tune({**settings, "lora": {"r": 2}}, tmp_path / "out")
    vg.tune(settings, tmp_path / "out")
    model, processor = load_vlm(tmp_path / "out", torch.float32), load_processor(tmp_path / "out")
    assert model.lm_head.weight.shape[0] == len(tasks.vocabulary()) + 1
    assert processor.tokenizer("<plan>").input_ids == [len(tasks.vocabulary())]


@pytest.mark.slow
def test_two_processes_tune_like_one(recipe: Any, tmp_path: Path) -> None:
    settings = {**recipe, "train": recipe["train"] | {"optim": "sgd", "learning_rate": 0.05, "max_steps": 2}}
    vg.tune(settings, tmp_path / "one")
    settings["train"]["per_device_train_batch_size"] = 1
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(settings))
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    code = "from vlmgraft.cli import main; main()"
    (tmp_path / "run.py").write_text(code)
    command = [*launch, "run.py", "tune", "recipe.yaml", "--out", "two"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    one, two = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "two"))
    for name, value in one.items():  # bfloat16 on disk
        assert torch.allclose(value.float(), two[name].float(), rtol=1e-2, atol=1e-4), name
    assert not list(tmp_path.glob(".two*"))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"priors": {}}, "priors: unknown key; did you mean 'prior'"),
        ({"prior": {"strenght": 1}}, r"prior\.strenght: unknown key; did you mean 'strength'"),
        ({"prior": {"mode": "adaptiv"}}, r"prior\.mode"),
        ({"data": {"train": "x.jsonl", "vaildation": "y"}}, r"data\.vaildation"),
        ({"donor": None}, "donor: missing"),
        ({"donor_base": None, "prior": {"delta": "base"}}, "donor_base: missing"),
        ({"prior": {"factors": "x"}}, r"prior\.factors"),
        ({"merge_adapter": True}, "merge_adapter"),
        ({"lora": {"r": 2}, "prior": {"when": "backward"}}, r"prior\.when: backward"),
        ({"train": {"learning_rat": 1}}, r"train\.learning_rat"),
        ({"prior": {"modules": ["attentoin"]}}, "modules: 'attentoin'"),
    ],
)
def test_bad_recipes_are_refused_before_anything_is_made(recipe: Any, tmp_path: Path, change: Any, said: str) -> None:
    with pytest.raises((RecipeError, AlignmentError), match=said):
        vg.tune({**recipe, **change}, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_the_output_is_no_input_and_a_donor_must_fit(recipe: Any, trio: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with pytest.raises(OutputError, match="exists"):
        vg.tune(recipe, tmp_path / "out")
    with pytest.raises(AlignmentError, match="same folder"):
        vg.tune({**recipe, "donor": str(trio / "vlm")}, tmp_path / "other")


@pytest.mark.parametrize("how", ["accelerate", "arguments"])
def test_deepspeed_is_refused_before_anything_is_loaded(
    how: str, recipe: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As `accelerate launch --use_deepspeed` says it in the environment, and as a field of the trainer."""
    opened: list[object] = []
    monkeypatch.setattr(tune, "open_checkpoint", opened.append)
    if how == "accelerate":
        monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    else:
        recipe["train"]["deepspeed"] = {"zero_optimization": {"stage": 2}}
    with pytest.raises(RecipeError, match="deepspeed: ZeRO-2 and ZeRO-3 keep gradients to themselves"):
        vg.tune(recipe, tmp_path / "out")
    assert not opened and not list(tmp_path.iterdir())


def test_overrides_of_a_validated_recipe_are_not_lost_in_silence(recipe: Any, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"prior\.strength=2: the recipe is validated already"):
        vg.tune(load_tune_recipe(recipe), tmp_path / "out", overrides=["prior.strength=2"])


def test_a_small_model_is_trained_with_one_thread(recipe: Any, tmp_path: Path, threads_seen: list[int]) -> None:
    vg.tune(recipe | {"prior": {"mode": "none"}}, tmp_path / "out")
    assert set(threads_seen) == {1}
