"""Every recipe key and every option of the command line with values of the wrong kind: a refusal, never a traceback.

Keys come from the recipes' schemas, options from the application, so that a new one is tried without being listed.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings, strategies as st
from typer.main import get_command

from vlmgraft.cli import app
from vlmgraft.methods import METHODS
from vlmgraft.recipe.schema import json_schema
from vlmgraft.recipe.tune import TuneRecipe

CODES = (0, 1, 2, 130)
YAML = [
    "-1", "0", "1", "9" * 40, "9" * 5000, "1e400", ".inf", ".nan", "true", "null", '""', "x", "[]", "[1]", "{}",
    "{a: 1}", '"a\\x1b[2J"', "[[[]]]", "-0.5", "2001-01-01", "2001-99-99", "!!binary aGk=", "[a, b]", '"../x"',
    "1e-320", "[null]", "0-999999999", "!!python/name:os.system", "[", "&a [*a]",
]  # fmt: skip
TEXTS = [
    "", " ", "-1", "0", "1e400", "nan", "9" * 40, "x", "/", "/proc/self/x", "a" * 5000, "\x1b[2J", "=", "a=b", "--",
    "..", "\udcff", "💥", ",", ":", "0-9999999999", "/dev/full", "²", "٣", "9" * 5000,
]  # fmt: skip
Run = Callable[..., Any]
Key = tuple[str, str]


def properties(schema: Mapping[str, Any], shared: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    """Dotted names of all keys of a JSON schema, those of mappings inside it too."""
    for name, inner in schema.get("properties", {}).items():
        yield f"{prefix}{name}"
        for part in (inner, *inner.get("anyOf", ()), inner.get("items", {})):
            target = shared[part["$ref"].rpartition("/")[2]] if "$ref" in part else part
            yield from properties(target, shared, f"{prefix}{name}.")


def merge_keys() -> list[Key]:
    """Method and key of every key of a merge recipe, and some that are none."""
    schema = json_schema()
    shared = schema["$defs"]
    keys = [("task_arithmetic", key) for key in (*properties(schema, shared), "nothing", "output.nothing")]
    for alternative in schema["properties"]["method"]["oneOf"][1:]:
        name = alternative["properties"]["name"]["const"]
        keys += [(name, f"method.{key}") for key in properties(alternative, shared)]
    return keys


def tune_keys() -> list[Key]:
    """Every key of a tune recipe, with every field of the trainer; what is below `lora` is read with a model only."""
    from trl import SFTConfig

    schema = TuneRecipe.model_json_schema()
    keys = [*properties(schema, schema["$defs"]), "nothing", "train.epochs", "train.nothing"]
    return [("tune", key) for key in (*keys, *(f"train.{field.name}" for field in dataclasses.fields(SFTConfig)))]


def parameters() -> Iterator[tuple[tuple[str, ...], Any]]:
    """Command and argument or option, of every command."""
    for name, command in get_command(app).commands.items():  # type: ignore[attr-defined]
        inner = getattr(command, "commands", None)
        for words, one in [((name, key), value) for key, value in inner.items()] if inner else [((name,), command)]:
            for parameter in one.params:
                yield words, parameter


MERGE, TUNE = merge_keys(), tune_keys()
OPTIONS = [
    (words, parameter.opts[0], bool(getattr(parameter, "is_flag", False)))
    for words, parameter in parameters()
    if parameter.opts[0].startswith("-") and (words[0], parameter.opts[0]) != ("demo", "--out")
]


def check(run: Run, *words: object) -> None:
    ran = run(*words)
    assert ran.code in CODES and "Traceback" not in ran.err and "mistake of vlmgraft" not in ran.err, ran.err


def check_key(key: Key, value: str, trio: Path, folder: Path, run: Run) -> None:
    """A dry run with one key set; of `tune`, which has none, a recipe whose traces are missing."""
    name, setting = key
    models = {"vlm": "vlm", "donor": "donor", "donor_base": "base", "vlm_base": "base"}
    recipe: dict[str, Any] = {key: str(trio / place) for key, place in models.items()}
    if name == "tune":
        del recipe["vlm_base"]
        recipe["data"] = {"train": "nowhere.jsonl"}
    else:
        gated = {"calibration": {"data": "nowhere.jsonl"}} if name in ("frism", "curvature") else {}
        recipe["method"] = {"name": name, **gated}
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    way = ("tune", folder / "recipe.yaml", "--out", folder / "out") if name == "tune" else ("merge", "--dry-run")
    check(run, *way, *(() if name == "tune" else (folder / "recipe.yaml",)), "--set", f"{setting}={value}")


def check_option(option: tuple[tuple[str, ...], str, bool], value: str, folder: Path, run: Run) -> None:
    """A command on inputs that do not exist, with one option set: nothing heavy begins."""
    words, name, flag = option
    (folder / "taken").touch()
    rest = ["--out", folder / "taken"] if words == ("demo",) else [] if words[0] == "lab" else [folder / "missing"]
    check(run, *words, *rest, name if flag or not name.startswith("--") else f"{name}={value}")


def test_nothing_is_left_out() -> None:
    """By hand: every method and section, both formats; every command, with an option that only it has."""
    assert {name for name, _ in MERGE} == {*METHODS}
    keys = {key for _, key in MERGE}
    assert {"layers", "more_donors.donor_base", "output.shard_size", "method.calibration.packing"} <= keys
    assert {"method.budget_guarantee.level", "method.density", "method.prior"} <= keys
    keys = {key for _, key in TUNE}
    assert {"prior.strength", "data.columns", "lora", "train.learning_rate", "train.max_length"} <= keys
    options = {(words[0], name) for words, name, _ in OPTIONS}
    assert {("merge", "--workdir"), ("verify", "--source"), ("report", "--figures"), ("front", "--budgets")} <= options
    assert {words[0] for words, _, _ in OPTIONS} == set(get_command(app).commands)  # type: ignore[attr-defined]


FIRST = [*MERGE, *(key for key in TUNE if not key[1].startswith("train."))]


@pytest.mark.parametrize(
    "keys",
    [
        pytest.param(FIRST, id="recipes"),
        pytest.param([key for key in TUNE if key not in FIRST], id="trainer", marks=pytest.mark.slow),
    ],
)
def test_every_key_once(
    keys: list[Key], trio: Path, tmp_path: Path, vlmgraft: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for number, key in enumerate(keys):
        check_key(key, YAML[number % len(YAML)], trio, tmp_path, vlmgraft)


def test_every_option_once(tmp_path: Path, vlmgraft: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for number, option in enumerate(OPTIONS):
        check_option(option, TEXTS[number % len(TEXTS)], tmp_path, vlmgraft)


def test_arguments(tmp_path: Path, vlmgraft: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every argument that names something: a text that cannot be a file's name, a device, a folder, nothing."""
    monkeypatch.chdir(tmp_path)
    for words in dict.fromkeys(words for words, _ in parameters()):
        if words[0] not in ("demo", "lab", "init"):
            for value in ("", "a" * 5000, "/dev/null", "/", "\x1b[2J"):
                check(vlmgraft, *words, value, value, "--out", tmp_path / "out")
                check(vlmgraft, *words, value)


MANY = settings(max_examples=60, derandomize=True, suppress_health_check=list(HealthCheck))
KEYS = st.tuples(st.sampled_from([*MERGE, *TUNE]), st.sampled_from(YAML) | st.text(max_size=8))
VALUES = st.tuples(st.sampled_from(OPTIONS), st.sampled_from(TEXTS) | st.text(max_size=8))


@pytest.mark.slow
@MANY
@given(key=KEYS, option=VALUES)
def test_many(
    key: Any, option: Any, trio: Path, tmp_path: Path, vlmgraft: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    check_key(*key, trio, tmp_path, vlmgraft)
    check_option(*option, tmp_path, vlmgraft)
