"""Every family × every method: merged on disk as in memory, with the VLM's names, shapes and dtypes; it loads again."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from naive import ROWS, Models, Row, Tensors
from safetensors.torch import load_file
from zoo import CASES, Trio

from vlmgraft.alignment import align
from vlmgraft.checkpoint.index import open_checkpoint
from vlmgraft.merging import merge_tensors
from vlmgraft.methods import METHODS
from vlmgraft.methods.base import check_numbers
from vlmgraft.recipe.model import Recipe, load_recipe
from vlmgraft.spectral.decompose import decompose
from vlmgraft.spectral.gates import constant_gates

Trios = Callable[[str], Trio]
COPIED = ("config.json", "generation_config.json")


def test_there_are_no_gaps() -> None:
    """A method is registered with its row; that a family is with its case, test_pairing.py checks."""
    assert set(METHODS) == set(ROWS)


def recipe_of(trio: Trio, method: str) -> Recipe:
    row = ROWS[method]
    models = {key: str(getattr(trio, key)) for key in ("vlm", "donor", "donor_base", "vlm_base")}
    return load_recipe({**models, "method": {"name": method, **row.options}, "modules": list(row.modules)})


def merged(recipe: Recipe, out: Path, gates: float | None = None, *, threads: int = 1, shard_size: int = 20_000) -> Any:
    opened = [open_checkpoint(str(getattr(recipe, key))) for key in ("vlm", "donor", "donor_base", "vlm_base")]
    alignment, method = align(*opened, modules=recipe.modules, layers=recipe.layers), recipe.method
    check_numbers(method, alignment)
    if gates is not None:
        store = decompose(alignment, out.with_name("factors"))
        method = method.bind(
            store, constant_gates({name: tuple(store[name].s.shape) for name in store}, gates, method.scale)
        )
    merge_tensors(alignment, method, out, shard_size=shard_size, threads=threads)
    return alignment


def in_memory(trio: Trio, row: Row, names: list[str], vlm: Tensors) -> Tensors:
    """The naive twin on tensors that transformers, not the alignment, has put under the VLM's names."""
    parts = [{n: trio.in_vlm(role)[n] for n in names} for role in ("donor", "donor_base", "vlm_base")]
    found = {name: re.search(r"layers\.(\d+)\.", name) for name in names}
    layers = {name: int(match[1]) if match else None for name, match in found.items()}
    return row.twin(Models({name: vlm[name].float() for name in names}, *parts, layers))


@pytest.mark.parametrize("method", sorted(METHODS))
@pytest.mark.parametrize("case", CASES)
def test_a_merge_is_the_naive_merge(case: str, method: str, trio: Trios, tmp_path: Path) -> None:
    folders, out = trio(case), tmp_path / "out"
    alignment = merged(recipe_of(folders, method), out, ROWS[method].gates)
    before = load_file(folders.vlm / "model.safetensors")
    after = {name: one for file in sorted(out.glob("*.safetensors")) for name, one in load_file(file).items()}
    assert {n: (t.shape, t.dtype) for n, t in after.items()} == {n: (t.shape, t.dtype) for n, t in before.items()}
    names = [tensor.name for tensor in alignment.merged]
    expected = in_memory(folders, ROWS[method], names, before)
    for name, tensor in after.items():
        if name in expected:
            torch.testing.assert_close(
                tensor.float(), expected[name], rtol=2**-8, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}"
            )
        else:
            assert torch.equal(tensor, before[name]), name
    assert any(not torch.equal(after[name], before[name]) for name in names)


@pytest.mark.parametrize("method", ["dare_linear", "dare_ties", "ties", "frank"])
def test_what_is_drawn_or_found_does_not_depend_on_threads_or_shards(method: str, trio: Trios, tmp_path: Path) -> None:
    options = {**ROWS[method].options, **({} if method == "frank" else {"density": 0.3})}
    recipe = recipe_of(trio("qwen3_vl_moe"), method)
    recipe = recipe.model_copy(update={"method": type(recipe.method)(**options)})
    found = []
    for number, (threads, shard_size) in enumerate(((1, 20_000), (3, 10**9))):
        merged(recipe, tmp_path / str(number), threads=threads, shard_size=shard_size)
        files = (tmp_path / str(number)).glob("*.safetensors")
        found.append({name: one for file in files for name, one in load_file(file).items()})
    assert found[0].keys() == found[1].keys()
    assert all(torch.equal(one, found[1][name]) for name, one in found[0].items())


@pytest.mark.parametrize("case", [name for name, case in CASES.items() if case.loadable])
def test_a_merge_loads_again(case: str, trio: Trios, tmp_path: Path) -> None:
    folders, out = trio(case), tmp_path / "out"
    merged(recipe_of(folders, "task_arithmetic"), out)
    for name in COPIED:
        if (folders.vlm / name).exists():
            (out / name).write_bytes((folders.vlm / name).read_bytes())
    auto = transformers.AutoModelForImageTextToText
    model, report = auto.from_pretrained(out, dtype="auto", output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"] and not report["mismatched_keys"]
    assert type(model).__name__ == f"{folders.case.vlm}ForConditionalGeneration"
