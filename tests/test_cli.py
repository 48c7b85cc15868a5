"""The command line: what is refused, with which words, and that nothing is left behind; then what is answered."""

from __future__ import annotations

import importlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from typer.main import get_command

from tests.recipe_place import Place
from vlmgraft import cli, pipeline

WEIGHTS = "model.safetensors"
UP, DOWN = "model.layers.1.mlp.up_proj.weight", "model.layers.2.mlp.down_proj.weight"
METHODS = ("task_arithmetic", "frism")
Fault = Callable[[Place], list[str]]


def edit(folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    """Rewrite the weights of a folder after `change`."""
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})


def shards(folder: Path) -> dict[str, str]:
    """Cut the weights of a folder in two shards with an index; its map from tensor to file."""
    tensors = load_file(folder / WEIGHTS)
    names = sorted(tensors)
    parts = {"model-00001-of-00002.safetensors": names[:20], "model-00002-of-00002.safetensors": names[20:]}
    for file, members in parts.items():
        save_file({name: tensors[name] for name in members}, folder / file, metadata={"format": "pt"})
    (folder / WEIGHTS).unlink()
    weight_map = {name: file for file, members in parts.items() for name in members}
    (folder / f"{WEIGHTS}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return weight_map


def missing_shard(place: Place) -> list[str]:
    folder = place.copy("donor")
    shards(folder)
    (folder / "model-00002-of-00002.safetensors").unlink()
    return ["donor/model-00002-of-00002.safetensors", "missing", "download"]


def truncated_shard(place: Place) -> list[str]:
    folder = place.copy("vlm")
    shards(folder)
    file = folder / "model-00002-of-00002.safetensors"
    os.truncate(file, file.stat().st_size - 1000)
    return ["vlm/model-00002-of-00002.safetensors", "truncated", "download"]


def absent_tensor(place: Place) -> list[str]:
    folder = place.copy("base")
    weight_map = shards(folder) | {"model.layers.9.nowhere.weight": "model-00001-of-00002.safetensors"}
    (folder / f"{WEIGHTS}.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return [f"base/{WEIGHTS}.index.json", "model.layers.9.nowhere.weight", "does not have it"]


def other_shape(place: Place) -> list[str]:
    for name in ("donor", "base"):
        edit(place.copy(name), lambda tensors: tensors.update({UP: tensors[UP][:, :64].contiguous()}))
    return ["layers.1.mlp.up_proj.weight", "[256, 64]", "[256, 128]"]


def other_family(place: Place) -> list[str]:
    folder = place.copy("donor")
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}
    (folder / "config.json").write_text(json.dumps(config))
    return [str(folder), "llama", "qwen2", "choose a donor"]


def zero_task_vector(place: Place) -> list[str]:
    place.copy("donor", source="base")
    return ["task vector is zero", "donor", "same weights"]


def same_folder(place: Place) -> list[str]:
    place.recipe["donor_base"] = place.recipe["donor"]
    return ["donor_base", "same folder", "task vector is zero"]


def poison(name: str, tensor: str, value: float) -> Fault:
    def fault(place: Place) -> list[str]:
        def change(tensors: dict[str, torch.Tensor]) -> None:
            tensors[next(key for key in tensors if key.endswith(tensor))].view(-1)[-1] = value

        edit(place.copy(name), change)
        return [tensor.removeprefix("model."), f"{name}/{WEIGHTS}", "NaN or infinity"]

    return fault


def unknown_key(place: Place) -> list[str]:
    place.recipe["donor_bass"] = place.recipe.pop("donor_base")
    return ["donor_bass", "donor_base"]


def unknown_option(place: Place) -> list[str]:
    place.recipe["method"]["scael"] = 1.0
    return ["method.scael", "scale"]


def output_exists(place: Place) -> list[str]:
    place.out.mkdir()
    (place.out / "mine.txt").write_text("keep me")
    return [str(place.out), "exists", "another"]


def output_is_input(place: Place) -> list[str]:
    place.out = place.folder / "donor"
    return [str(place.out), "is the input", "another"]


def output_inside_input(place: Place) -> list[str]:
    place.out = place.copy("vlm") / "merged"
    return [str(place.out), "lies inside", "another"]


FAULTS: dict[str, Fault] = {
    "missing shard": missing_shard,
    "truncated shard": truncated_shard,
    "index names an absent tensor": absent_tensor,
    "donor of another shape": other_shape,
    "donor of another family": other_family,
    "donor equals its base": zero_task_vector,
    "donor and base are one folder": same_folder,
    "NaN in the donor": poison("donor", DOWN, float("nan")),
    "infinity in the donor's base": poison("base", UP, float("inf")),
    "NaN in the VLM": poison("vlm", DOWN.removeprefix("model."), float("nan")),
    "unknown recipe key": unknown_key,
    "unknown method option": unknown_option,
    "output exists": output_exists,
    "output is an input": output_is_input,
    "output inside an input": output_inside_input,
}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("fault", FAULTS)
def test_bad_input_is_refused_before_anything_is_written(
    fault: str, method: str, trio: Path, tmp_path: Path, vlmgraft: Any
) -> None:
    place = Place(tmp_path, trio, method)
    said = FAULTS[fault](place)
    before = place.files()
    ran = vlmgraft("merge", place.write(), "--out", place.out, "--quiet")
    assert ran.code == 2, ran.err
    assert [part for part in said if part not in ran.err] == [], ran.err
    assert ran.err.startswith("vlmgraft: ") and "Traceback" not in ran.err
    assert place.files() == before


@pytest.mark.parametrize("method", METHODS)
def test_the_same_place_without_a_fault_merges(method: str, trio: Path, tmp_path: Path, vlmgraft: Any) -> None:
    place = Place(tmp_path, trio, method)
    ran = vlmgraft("merge", place.write(), "--out", place.out, "--quiet", "--json")
    assert ran.code == 0, ran.err
    receipt = json.loads(ran.out)
    assert receipt == json.loads((place.out / "receipt.json").read_text())
    assert sum(tensor["verdict"] == "merged" for tensor in receipt["tensors"]) == 4 * 7
    assert [path.name for path in place.out.parent.iterdir()] == ["merged"], "no leftovers beside the output"


@pytest.mark.parametrize(
    ("key", "value", "said"), [("data", "absent.jsonl", "absent.jsonl"), ("samples", 0, "samples")]
)
def test_frism_reads_its_calibration_first(
    key: str, value: Any, said: str, trio: Path, tmp_path: Path, vlmgraft: Any
) -> None:
    place = Place(tmp_path, trio, "frism")
    place.recipe["method"]["calibration"][key] = value
    before = place.files()
    ran = vlmgraft("merge", place.write(), "--out", place.out, "--quiet")
    assert (ran.code, place.files()) == (2, before)
    assert said in ran.err


def test_an_image_that_is_missing_is_named_with_its_line(trio: Path, tmp_path: Path, vlmgraft: Any) -> None:
    place = Place(tmp_path, trio, "frism")
    (tmp_path / "grey.png").unlink()
    ran = vlmgraft("merge", place.write(), "--out", place.out, "--quiet")
    assert ran.code == 2
    assert "calibration.jsonl, line 1" in ran.err and "grey.png" in ran.err
    assert not list(place.out.parent.iterdir())


@pytest.mark.parametrize("arguments", [[], ["recipe.yaml"], ["absent.yaml", "--out", "merged"]])
def test_missing_arguments_are_input_errors(
    arguments: list[str], trio: Path, tmp_path: Path, vlmgraft: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Place(tmp_path, trio, "task_arithmetic").write()
    ran = vlmgraft("merge", *arguments)
    assert ran.code == 2
    assert ran.err.startswith("vlmgraft: ")


@pytest.mark.parametrize("arguments", [["merge", "--nonsense"], ["nonsense"], ["lab", "nonsense"]])
def test_unknown_commands_and_options_are_input_errors(arguments: list[str], vlmgraft: Any) -> None:
    assert vlmgraft(*arguments).code == 2


def test_schema_is_json_and_refuses_unknown_keys(vlmgraft: Any) -> None:
    schema = json.loads(vlmgraft("merge", "--schema").out)
    assert {"vlm", "donor", "method"} <= set(schema["properties"])
    assert schema["additionalProperties"] is False


def test_set_overrides_the_recipe(trio: Path, tmp_path: Path, vlmgraft: Any) -> None:
    place = Place(tmp_path, trio, "task_arithmetic")
    assert vlmgraft("merge", place.write(), "--out", place.out, "--set", "method.scale=0", "--quiet").code == 0
    assert (place.out / WEIGHTS).read_bytes() == (trio / "vlm" / WEIGHTS).read_bytes()
    assert "method.scael" in vlmgraft("merge", place.write(), "--out", tmp_path / "b", "--set", "method.scael=0").err


def test_inspect_by_recipe_and_by_options_agree(trio: Path, tmp_path: Path, vlmgraft: Any) -> None:
    place = Place(tmp_path, trio, "task_arithmetic")
    models = [
        part for key in ("vlm", "donor", "donor_base") for part in (f"--{key.replace('_', '-')}", place.recipe[key])
    ]
    by_recipe = vlmgraft("inspect", place.write(), "--json")
    by_options = vlmgraft("inspect", *models, "--json")
    assert (by_recipe.code, by_options.code) == (0, 0)
    planned, paired = json.loads(by_recipe.out), json.loads(by_options.out)
    assert planned.pop("cost") and paired.pop("cost") is None, "without a method there is no cost"
    assert planned == paired
    assert planned["layers"] == 4
    assert "28 merged" in vlmgraft("inspect", *models).out
    assert vlmgraft("inspect", "--vlm", place.recipe["vlm"]).code == 2
    both = vlmgraft("inspect", tmp_path / "recipe.yaml", *models[:2])
    assert both.code == 2 and "--set vlm=FOLDER" in both.err


def test_inspect_refuses_a_truncated_file(trio: Path, tmp_path: Path, vlmgraft: Any) -> None:
    place = Place(tmp_path, trio, "task_arithmetic")
    said = truncated_shard(place)
    ran = vlmgraft("inspect", place.write())
    assert ran.code == 2
    assert all(part in ran.err for part in said)


def test_lab_path_is_the_trio(trio: Path, vlmgraft: Any) -> None:
    assert Path(vlmgraft("lab", "path").out.strip()) == trio


def test_an_interruption_is_130_and_names_the_way_on(
    trio: Path, tmp_path: Path, vlmgraft: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    place = Place(tmp_path, trio, "task_arithmetic")
    monkeypatch.setattr(pipeline, "merge", interrupted)
    ran = vlmgraft("merge", place.write(), "--out", place.out)
    assert ran.code == 130
    assert "--resume" in ran.err and "Traceback" not in ran.err


@pytest.mark.parametrize("fault", ["truncated shard", "unknown recipe key"])
def test_exit_code_of_the_process(fault: str, trio: Path, tmp_path: Path) -> None:
    place = Place(tmp_path, trio, "task_arithmetic")
    said = FAULTS[fault](place)
    entry = [sys.executable, "-c", "from vlmgraft.cli import main; main()"]
    command = [*entry, "merge", str(place.write()), "--out", str(place.out)]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert ran.returncode == 2
    assert all(part in ran.stderr for part in said)
    assert not list(place.out.parent.iterdir())


def options_of(command: Any) -> set[str]:
    return {name for parameter in command.params for name in (*parameter.opts, *parameter.secondary_opts)}


def commands() -> dict[str, Any]:
    """Every command by its words."""
    found: dict[str, Any] = {}
    for name, command in get_command(cli.app).commands.items():  # type: ignore[attr-defined]
        inner = getattr(command, "commands", None)
        found |= {f"{name} {key}": value for key, value in inner.items()} if inner else {name: command}
    return found


LOADS_MODELS = {
    "merge", "decompose", "gates", "front", "evaluate", "compare", "drift", "knockout", "ranks", "sweep", "choose",
    "attention", "steer", "tune", "play", "inspect",
}  # fmt: skip


@pytest.mark.parametrize("name", sorted(commands()))
def test_every_command_keeps_the_conventions(name: str, vlmgraft: Any) -> None:
    options = options_of(commands()[name])
    assert {"--json", "--quiet", "-q", "--verbose", "-v"} <= options
    assert ("--out" in options) == ("-o" in options)
    assert ({"--device", "--dtype"} <= options) == (name in LOADS_MODELS)
    short = vlmgraft(*name.split(), "-h")
    assert short.code == 0 and "Exit codes: 0 done" in short.out
    assert short.out == vlmgraft(*name.split(), "--help").out


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["merge", "--nonsense"], ["--nonsense", "vlmgraft merge --help"]),
        (["nonsense"], ["nonsense", "vlmgraft --help"]),
        (["attention", "m", "--samples", "many"], ["--samples", "integer", "vlmgraft attention --help"]),
        (["evaluate", "m", "-o", "o", "--dtype", "int3"], ["--dtype", "int3", "bfloat16"]),
        (["export", "m"], ["--to", "lora", "hub", "vlmgraft export --help"]),
    ],
)
def test_a_wrong_command_line_is_one_line_with_its_remedy(
    arguments: list[str], parts: list[str], vlmgraft: Any
) -> None:
    ran = vlmgraft(*arguments)
    assert ran.code == 2 and ran.out == ""
    assert ran.err.startswith("vlmgraft: ") and ran.err.count("\n") == 1
    assert [part for part in parts if part not in ran.err] == []


def test_vlm_and_donor_exchanged_are_told(trio: Path, tmp_path: Path, vlmgraft: Any) -> None:
    place = Place(tmp_path, trio, "task_arithmetic")
    place.recipe |= {"vlm": place.recipe["donor"], "donor": place.recipe["vlm"]}
    ran = vlmgraft("merge", place.write(), "-o", place.out)
    assert ran.code == 2 and "exchange the two" in ran.err


@pytest.mark.parametrize("name", ["decompose", "front", "gates", "tune"])
def test_under_torchrun_the_first_process_alone_shows_the_result(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    module = importlib.import_module(f"vlmgraft.cli.{name}")
    cls = next(value for value in vars(module).values() if getattr(value, "__module__", "") == module.__name__)
    shown = {}
    for rank in "01":
        monkeypatch.setenv("RANK", rank)
        monkeypatch.setenv("WORLD_SIZE", "2")
        for as_json in (True, False):
            options = {"recipe": Path(), "out": Path(), "factors": Path(), "budgets": "1", "as_json": as_json}
            chosen = cls(**{key: value for key, value in options.items() if key in cls.__dataclass_fields__})
            chosen.show({"steps": 3}, "3 steps")
        shown[rank] = capsys.readouterr().out
    assert shown == {"0": '{"steps": 3}\n3 steps\n', "1": ""}


def test_force_replaces_what_vlmgraft_wrote_and_nothing_else(trio: Path, tmp_path: Path, vlmgraft: Any) -> None:
    place = Place(tmp_path, trio, "task_arithmetic")
    recipe = place.write()
    assert vlmgraft("merge", recipe, "-o", place.out, "-q").code == 0
    before = (place.out / WEIGHTS).read_bytes()
    assert vlmgraft("merge", recipe, "-o", place.out, "-q").code == 2
    failed = vlmgraft("merge", recipe, "-o", place.out, "-q", "--force", "--set", "vlm=absent/absent")
    assert failed.code == 2 and (place.out / WEIGHTS).read_bytes() == before, "what was there is put back"
    assert vlmgraft("merge", recipe, "-o", place.out, "-q", "--force", "--set", "method.scale=0").code == 0
    assert (place.out / WEIGHTS).read_bytes() == (trio / "vlm" / WEIGHTS).read_bytes() != before
    assert [path.name for path in place.out.parent.iterdir()] == ["merged"]
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").touch()
    refused = vlmgraft("merge", recipe, "-o", tmp_path / "mine", "-q", "--force")
    assert refused.code == 2 and "this is none" in refused.err and (tmp_path / "mine" / "thesis.tex").exists()
    assert "give one of them" in vlmgraft("merge", recipe, "-o", place.out, "--force", "--resume").err
    (tmp_path / "front").mkdir()
    (tmp_path / "front" / "front.jsonl").touch()
    options = ("-o", tmp_path / "front", "--factors", tmp_path, "--budgets", "0.1", "--force")
    assert "unknown key" in vlmgraft("front", recipe, *options).err, "a front is replaced, were the recipe right"


def test_nothing_that_is_written_says_where_files_lie(trio: Path, tmp_path: Path, vlmgraft: Any) -> None:
    place = Place(tmp_path, trio, "task_arithmetic")
    assert vlmgraft("merge", place.write(), "-o", place.out, "-q").code == 0
    for path in place.out.iterdir():
        if path.suffix in (".md", ".json", ".yaml"):
            assert str(tmp_path) not in path.read_text() and str(trio) not in path.read_text(), path.name
    card = yaml.safe_load((place.out / "README.md").read_text().split("---")[1])
    assert card["license"] == "apache-2.0"
    sources = [f"--set={key}={place.recipe[key]}" for key in ("vlm", "donor", "donor_base")]
    again = tmp_path / "again"
    assert "--set vlm=PATH" in vlmgraft("merge", place.out / "recipe.yaml", "-o", again, "-q").err
    assert vlmgraft("merge", place.out / "recipe.yaml", "-o", again, "-q", *sources).code == 0
    assert (again / WEIGHTS).read_bytes() == (place.out / WEIGHTS).read_bytes()


def test_json_is_one_object_and_everything_else_is_on_standard_error(trio: Path, tmp_path: Path, vlmgraft: Any) -> None:
    place = Place(tmp_path, trio, "task_arithmetic")
    for arguments in (
        ("lab", "path"), ("inspect", place.write()), ("merge", place.write(), "-o", place.out), ("verify", place.out),
    ):  # fmt: skip
        assert isinstance(json.loads(vlmgraft(*arguments, "--json").out), dict), arguments


def test_device_and_token_reach_their_libraries_and_nothing_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    from vlmgraft.cli.options import environment
    from vlmgraft.errors import InputError
    from vlmgraft.hf.placement import default_device, default_dtype

    monkeypatch.delenv("VLMGRAFT_DEVICE", raising=False)
    with environment(VLMGRAFT_DEVICE="cpu", VLMGRAFT_DTYPE="bfloat16", HF_TOKEN=None):
        assert default_device() == torch.device("cpu") and default_dtype(default_device()) == torch.bfloat16
    assert "VLMGRAFT_DEVICE" not in os.environ
    with environment(VLMGRAFT_DEVICE="nonsense"), pytest.raises(InputError, match="--device nonsense"):
        default_device()


def test_progress_without_a_terminal_is_lines(capsys: pytest.CaptureFixture[str]) -> None:
    from vlmgraft.cli.output import LineProgress

    with LineProgress(every=0.01) as lines:
        lines(0, 40, "q_proj")
        lines(10, 40, "q_proj")
        while "10 of 40" not in (said := capsys.readouterr().err):
            pass
    assert "q_proj: 10 of 40 (25 %), " in said and " left\n" in said


def test_init_writes_a_recipe_that_merges(trio: Path, tmp_path: Path, vlmgraft: Any) -> None:
    donor = tmp_path / "donor"
    shutil.copytree(trio / "donor", donor)
    (donor / "README.md").write_text(f"---\nbase_model: {trio / 'base'}\n---\n")
    recipe = tmp_path / "of a new folder" / "recipe.yaml"
    ran = vlmgraft("init", "--vlm", trio / "vlm", "--donor", donor, "-o", recipe, "--json")
    assert json.loads(ran.out) == {"out": str(recipe), "donor_base": str(trio / "base")}
    assert vlmgraft("merge", recipe, "-o", tmp_path / "merged", "-q").code == 0
    assert vlmgraft("init", "-o", recipe).code == 2, "it exists"
    absent = vlmgraft("init", "-o", recipe, "--force", "--data", tmp_path / "none.jsonl")
    assert absent.code == 2 and "none.jsonl: no such question file" in absent.err


@pytest.mark.parametrize(("rows", "shares"), [(3, (2, 1)), (192, (128, 64)), (384, (256, 128)), (900, (512, 128))])
def test_init_takes_as_many_questions_as_the_file_has(
    tmp_path: Path, vlmgraft: Any, rows: int, shares: tuple[int, int]
) -> None:
    data, recipe = tmp_path / "questions: 1.jsonl", tmp_path / "recipe.yaml"
    data.write_text('{"image": "a.png", "question": "what?"}\n' * rows)
    ran = vlmgraft("init", "-o", recipe, "--vlm", "a/b", "--donor", tmp_path / "c", "--data", data)
    assert ran.code == 0, ran.err
    loaded = yaml.safe_load(recipe.read_text())
    assert loaded["method"]["name"] == "frism" and loaded["method"]["calibration"]["data"] == str(data)
    assert (loaded["method"]["calibration"]["samples"], loaded["method"]["calibration"]["held_out"]) == shares
    assert f"{rows} questions; {shares[0]} are learned from, {shares[1]} others" in ran.err
    told = "write donor_base, the model that the donor was tuned from"
    assert told in ran.out and f"inspect --vlm a/b --donor {tmp_path / 'c'} --distances --donor-base ONE" in ran.out
    later = vlmgraft("inspect", recipe)
    assert later.code == 2 and "donor_base: method frism needs it" in later.err


def test_costs_of_a_published_size(vlmgraft: Any) -> None:
    printed = json.loads(vlmgraft("costs", "--size", "7b", "--gpus", "8", "--json").out)
    assert printed["model"] == "Qwen2.5-VL-7B"
    assert [stage["name"] for stage in printed["stages"]] == [
        "merge", "decompose", "teacher", "gates", "fold", "evaluate",
    ]  # fmt: skip
    assert vlmgraft("costs").code == vlmgraft("costs", "--size", "7b", "--rank", "half").code == 2


def test_drift_of_a_model_from_itself_is_zero(trio: Path, tmp_path: Path, vlmgraft: Any) -> None:
    place = Place(tmp_path, trio, "frism")
    data = place.recipe["method"]["calibration"]["data"]
    ran = vlmgraft("drift", trio / "vlm", trio / "vlm", "--data", data, "--max-new-tokens", 4, "-q", "--json")
    assert json.loads(ran.out)["kl"] == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("value", ["\0", "\ud800"], ids=["NUL", "half a pair"])
def test_what_no_environment_holds_is_refused(
    vlmgraft: Any, trio: Path, monkeypatch: pytest.MonkeyPatch, value: str
) -> None:
    """As a device, which goes into the environment; it is then as it was."""
    monkeypatch.delenv("VLMGRAFT_DEVICE", raising=False)
    ran = vlmgraft("inspect", "--vlm", str(trio / "vlm"), "--donor", str(trio / "donor"), f"--device={value}")
    assert ran.code == 2 and "no value of an option" in ran.err
    assert "VLMGRAFT_DEVICE" not in os.environ
