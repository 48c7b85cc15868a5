"""The ready recipes: valid, and planned by the command on replicas of the models' real names and shapes."""

from __future__ import annotations

import json
import math
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from vlmgraft.alignment import align
from vlmgraft.checkpoint.index import open_checkpoint
from vlmgraft.evaluation.presets import PRESETS
from vlmgraft.recipe.model import load_recipe
from vlmgraft.recipe.tune import load_tune_recipe

sys.path.insert(0, str(Path(__file__).parents[1]))

from replica_tools import make, replicas, weights_in

RECIPES = sorted((Path(__file__).parents[2] / "recipes").glob("*.yaml"))
MERGES = [path for path in RECIPES if not path.name.startswith("drift")]
KEYS = ("vlm", "donor", "donor_base", "vlm_base")
HUB = replicas()

Runner = Callable[..., Any]


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The replica of a hub id, made once."""
    root = tmp_path_factory.mktemp("hub")

    def find(name: str) -> Path:
        folder = root / name.replace("/", "--")
        return folder if folder.exists() else make(HUB[name], folder)

    return find


def commented(text: str) -> dict[str, str]:
    """Bases that a recipe leaves in a comment."""
    return dict(re.findall(r"^# (donor_base|vlm_base): (\S+/\S+)", text, re.MULTILINE))


def plan_line(plan: dict[str, Any]) -> str:
    """The line that a recipe says what the merge will be with."""
    cost = plan["cost"]
    return (
        f"# plan: {plan['nbytes'] / 1e9:.1f} GB in {cost['files']} files; reads {cost['read'] / 1e9:.1f} GB, about "
        f"{cost['seconds']:.0f} s at 1 GB/s, {cost['memory'] / 1e6:.0f} MB of memory"
    )


def dry_run(vlmgraft: Runner, recipe: Path, sources: dict[str, Path], *more: str) -> dict[str, Any]:
    """The plan that the command prints."""
    overrides = [*(f"{key}={folder}" for key, folder in sources.items()), *more]
    arguments = [argument for override in overrides for argument in ("--set", override)]
    ran = vlmgraft("inspect", recipe, "--json", *arguments)
    assert ran.code == 0, ran.err
    return json.loads(ran.out)


@pytest.mark.parametrize("path", MERGES, ids=lambda path: path.stem)
def test_a_recipe_plans_on_the_real_layout(path: Path, vlmgraft: Runner, folder_of: Callable[[str], Path]) -> None:
    text, recipe = path.read_text(), load_recipe(path)
    named = {key: getattr(recipe, key) for key in KEYS if getattr(recipe, key)}
    sources = {key: folder_of(name) for key, name in named.items()}
    plan = dry_run(vlmgraft, path, sources)
    rows = plan["tensors"]
    layers = plan["layers"]
    projections = [row for row in rows if row["verdict"] == "merged" and row["name"].endswith("_proj.weight")]
    assert len(projections) == 7 * layers
    assert all(row["donor"] and row["donor"][0].split("layers.")[1] in row["name"] for row in projections)
    assert plan["nbytes"] == weights_in(HUB[recipe.vlm]) * {"BF16": 2, "F16": 2, "F32": 4}[HUB[recipe.vlm]["dtype"]]
    assert plan_line(plan) in text

    sources |= {key: folder_of(name) for key, name in commented(text).items()}
    whole = dry_run(vlmgraft, path, sources, "method={name: task_arithmetic}", "modules=[all, embeddings, head]")
    for row in whole["tensors"]:
        assert row["verdict"] == ("kept" if row["reason"].startswith("outside") else "merged"), row
    in_text = sum(math.prod(row["shape"]) for row in whole["tensors"] if row["verdict"] == "merged")
    donor = weights_in(HUB[recipe.donor])
    assert abs(in_text - donor) < 0.11 * donor  # as large as the donor, up to a tied head and added words


@pytest.mark.parametrize("path", [path for path in RECIPES if path not in MERGES], ids=lambda path: path.stem)
def test_a_tune_recipe_pairs_on_the_real_layout(path: Path, folder_of: Callable[[str], Path]) -> None:
    recipe = load_tune_recipe(path)
    assert recipe.donor is not None
    vlm, donor = open_checkpoint(folder_of(recipe.vlm)), open_checkpoint(folder_of(recipe.donor))
    alignment = align(vlm, donor, modules=recipe.prior.modules, layers=recipe.prior.layers)
    assert len(alignment.merged) == (7 + 3) * alignment.layers  # projections, and the biases of q, k and v
    pushed = sum(2 * math.prod(vlm.tensors[tensor.name].shape) for tensor in alignment.merged)
    assert f"Δ takes {pushed / 1e9:.1f} GB" in path.read_text()


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_the_commands_of_a_recipe_name_it_and_known_data(path: Path) -> None:
    text = path.read_text()
    commands = re.findall(r"^# vlmgraft (.+)$", text, re.MULTILINE)
    assert {line.split()[0] for line in commands} in ({"inspect", "merge", "evaluate"}, {"tune", "evaluate"})
    assert all(f"recipes/{path.name}" in line for line in commands if not line.startswith("evaluate"))
    assert set(re.findall(r"--data (\S+)", text)) <= set(PRESETS)
    assert max(map(len, text.splitlines())) <= 140
    models = {value for key, value in yaml.safe_load(text).items() if key in KEYS} | set(commented(text).values())
    assert models <= set(HUB)


@pytest.mark.parametrize("name", sorted({replica["hub"][0] for replica in HUB.values()}))
def test_a_replica_has_as_many_weights_as_the_model(name: str) -> None:
    """Where the published number is known, the patterns must multiply up to it exactly."""
    replica = HUB[name]
    assert replica["known"] and replica["inferred"]
    if replica["parameters"] is not None:
        assert weights_in(replica) == replica["parameters"]
