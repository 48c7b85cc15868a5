"""The same recipe gives the same bytes: for every registered method, whatever the number of threads, the shards of the
output, order and number of the input files, the pieces they are read in, and the seed of Python's hashes."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from vlmgraft.alignment import align
from vlmgraft.checkpoint.index import open_checkpoint
from vlmgraft.merging import merge_tensors
from vlmgraft.methods import METHODS
from vlmgraft.methods.base import check_numbers
from vlmgraft.recipe.model import Recipe, load_recipe
from vlmgraft.spectral.decompose import decompose
from vlmgraft.spectral.gates import Gates

sys.path.insert(0, str(Path(__file__).parent / "families"))
from naive import ROWS

KEYS = ("vlm", "donor", "donor_base", "vlm_base")
HIDDEN, INNER, LAYERS = 384, 768, 2
"""Large enough that linear algebra works with several threads if it may, and a tensor is read in several chunks."""
OPTIONS = {
    "dare_linear": {"density": 0.3, "seed": 1},
    "dare_ties": {"density": 0.3, "seed": 1},
    "ip_merging": {"threshold": 0.0},
    "spectral": {"rule": "truncate", "rank": 40},
}
"""Where those of the naive twins leave the interesting part out: what is drawn, and a rank that Krylov spaces find."""
Digests = dict[str, str]


def weights(generator: torch.Generator, spread: float) -> dict[str, Tensor]:
    """A decoder of two layers under the donor's names."""
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (50, HIDDEN), "model.norm.weight": (HIDDEN,)}
    for layer in (f"model.layers.{number}." for number in range(LAYERS)):
        shapes |= {f"{layer}self_attn.{letter}_proj.weight": (HIDDEN, HIDDEN) for letter in "qkvo"}
        shapes |= {f"{layer}mlp.{kind}_proj.weight": (INNER, HIDDEN) for kind in ("gate", "up")}
        shapes |= {f"{layer}mlp.down_proj.weight": (HIDDEN, INNER)}
        shapes |= {f"{layer}{kind}_layernorm.weight": (HIDDEN,) for kind in ("input", "post_attention")}
    return {name: spread * torch.randn(*shape, generator=generator) for name, shape in shapes.items()}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """VLM, donor and their bases, one file each."""
    folder, generator = tmp_path_factory.mktemp("models"), torch.Generator().manual_seed(0)
    base = weights(generator, 1.0)
    for key in KEYS:
        own = (
            base
            if key.endswith("base")
            else {n: t + w for (n, t), w in zip(base.items(), weights(generator, 0.1).values(), strict=True)}
        )
        own = {name: tensor.bfloat16() for name, tensor in own.items()}
        save(folder / key, [own | ({"visual.blocks.0.weight": torch.ones(3, 3)} if key == "vlm" else {})], key)
    return folder


def save(folder: Path, files: list[dict[str, Tensor]], key: str) -> None:
    """A checkpoint in these files."""
    folder.mkdir(parents=True)
    if len(files) == 1:
        save_file(files[0], folder / "model.safetensors")
    else:
        names = [f"model-{number:05d}-of-{len(files):05d}.safetensors" for number in range(1, len(files) + 1)]
        for name, tensors in zip(names, files, strict=True):
            save_file(tensors, folder / name)
        placed = {tensor: name for name, tensors in zip(names, files, strict=True) for tensor in tensors}
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": placed}))
    config = {"model_type": "qwen2_5_vl" if key == "vlm" else "qwen2", "tie_word_embeddings": True}
    (folder / "config.json").write_text(json.dumps(config))


def resharded(models: Path, out: Path, order: Callable[[list[str]], list[str]], files: int) -> Path:
    """The same checkpoints with their tensors in another order, over more files."""
    for key in KEYS:
        tensors = load_file(models / key / "model.safetensors")
        names = order(sorted(tensors))
        cuts = [names[number::files] for number in range(files)]
        save(out / key, [{name: tensors[name] for name in cut} for cut in cuts], key)
    return out


def recipe_of(models: Path, method: str) -> Recipe:
    row = ROWS[method]
    places = {key: str(models / key) for key in KEYS}
    options = {"name": method, **row.options, **OPTIONS.get(method, {})}
    return load_recipe({**places, "method": options, "modules": list(row.modules)})


def merged(
    models: Path, method: str, out: Path, *, threads: int = 1, shard_size: int = 10**9, factors: Path | None = None
) -> Digests:
    """Merge, and give a digest of every tensor. Methods with factors and gates have gates made up by name; factors: a
    store that fits, if there is one."""
    recipe = recipe_of(models, method)
    alignment = align(*(open_checkpoint(models / key) for key in KEYS), modules=recipe.modules, layers=recipe.layers)
    chosen: Any = recipe.method
    check_numbers(chosen, alignment)
    if hasattr(chosen, "bind"):
        store = decompose(alignment, factors or out.with_name("factors-" + out.name))
        logits = {name: torch.sin(torch.arange(len(store[name].s)) + len(name)) for name in store}
        chosen = chosen.bind(store, Gates(logits, chosen.scale))
    merge_tensors(alignment, chosen, out, threads=threads, shard_size=shard_size)
    return digests(out)


def digests(folder: Path) -> Digests:
    found = {}
    for file in sorted(folder.glob("*.safetensors")):
        for name, tensor in load_file(file).items():
            found[name] = hashlib.sha256(tensor.contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()
    return found


@contextmanager
def torch_threads(number: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("method", sorted(METHODS))
def test_the_same_bytes(method: str, models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = merged(models, method, tmp_path / "one")
    files = {path.name: path.read_bytes() for path in (tmp_path / "one").iterdir() if path.name != "receipt.json"}
    assert expected != digests(models / "vlm"), "the method does something"
    with torch_threads(3):
        assert merged(models, method, tmp_path / "again", threads=3) == expected, "threads"
    known = {"factors": tmp_path / "factors-one"}
    again = {path.name: path.read_bytes() for path in (tmp_path / "again").iterdir() if path.name != "receipt.json"}
    assert again == files, "whole files too"
    assert merged(models, method, tmp_path / "cut", threads=2, shard_size=500_000, **known) == expected, (
        "shards of the output"
    )
    assert len(list((tmp_path / "cut").glob("*.safetensors"))) > 5
    other = resharded(models, tmp_path / "inputs", lambda names: names[::-1], 4)
    assert merged(other, method, tmp_path / "resharded", **known) == expected, "order and number of input files"
    for module in ("plan", "engine", "pieces"):
        monkeypatch.setattr(f"vlmgraft.merging.{module}.CHUNK", 1 << 17)
    monkeypatch.setattr("vlmgraft.merging.engine.RANGE", 1 << 17)
    assert merged(models, method, tmp_path / "chunks", threads=2, **known) == expected, "pieces"


def test_every_method_has_a_row() -> None:
    assert set(METHODS) == set(ROWS), "a new method is tested here with the options of its row"


CHILD = """
import sys
from pathlib import Path
sys.path[:0] = sys.argv[1:3]
import json, torch
from test_determinism import merged
print(json.dumps({method: merged(Path(sys.argv[3]), method, Path(sys.argv[4]) / method) for method in sys.argv[5:]}))
"""


def in_a_process(models: Path, out: Path, threads: int, seed: str, methods: list[str]) -> dict[str, Digests]:
    """The same merges in a process of its own, with so many threads of torch and numpy, and a seed of hashes."""
    tests = Path(__file__).parent
    environment = os.environ | {"PYTHONHASHSEED": seed, "OMP_NUM_THREADS": str(threads)}
    environment |= {"OPENBLAS_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads), "MKL_DYNAMIC": "FALSE"}
    command = [sys.executable, "-c", CHILD, str(tests), str(tests / "families"), str(models), str(out), *methods]
    ran = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    found: dict[str, Digests] = json.loads(ran.stdout)
    return found


@pytest.mark.slow
def test_the_same_bytes_in_other_processes(models: Path, tmp_path: Path) -> None:
    """Every method with 1, 2 and 3 threads of the libraries and other seeds of Python's hashes."""
    runs = [
        in_a_process(models, tmp_path / seed, threads, seed, sorted(METHODS))
        for threads, seed in ((1, "1"), (2, "2"), (3, "3"))
    ]
    assert runs[0] == runs[1] == runs[2]
    assert set(runs[0]) == set(METHODS)
