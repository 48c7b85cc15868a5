"""Odd numbers through every method: NaN, infinity, subnormals, zeros, single rows, overflow; and an SVD that fails."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import scipy.linalg
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from vlmgraft.alignment import align
from vlmgraft.checkpoint.index import open_checkpoint
from vlmgraft.errors import AlignmentError, NumericalError, WeightsError
from vlmgraft.merging import Receipt, merge_tensors
from vlmgraft.methods import METHODS
from vlmgraft.methods.frism import GatedFold
from vlmgraft.pipeline import merge
from vlmgraft.recipe.model import load_recipe
from vlmgraft.spectral import svd
from vlmgraft.spectral.decompose import decompose
from vlmgraft.spectral.gates import constant_gates
from vlmgraft.spectral.svd_stack import decompose_stack

KEYS = ("vlm", "donor", "donor_base", "vlm_base")
OPTIONS: dict[str, dict[str, Any]] = {
    "frank": {"decay": 0.5},
    "ip_merging": {"threshold": 0.3, "rank": 2},
    "spectral": {"rule": "star"},
    "dare_linear": {"density": 0.5},
    "layer_swap": {"keep_layers": "0"},
}
GATED = ("frism", "curvature")
Q, OUT, UP = (f"model.layers.0.{end}.weight" for end in ("self_attn.q_proj", "self_attn.o_proj", "mlp.up_proj"))
Models = dict[str, dict[str, Tensor]]
Change = Callable[[Models], None]


def models(dtype: torch.dtype = torch.bfloat16) -> Models:
    """One layer, near each other, and what a VLM has beside it: an empty tensor, a scalar, fp8."""
    generator = torch.Generator().manual_seed(0)
    shapes = {f"model.layers.0.self_attn.{one}_proj.weight": (8, 8) for one in "qkvo"}
    shapes |= {f"model.layers.0.mlp.{one}_proj.weight": (12, 8) for one in ("gate", "up")}
    shapes |= {"model.layers.0.mlp.down_proj.weight": (8, 12), "model.embed_tokens.weight": (20, 8)}
    base = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    norms = {f"model.layers.0.{one}_layernorm.weight": torch.ones(8) for one in ("input", "post_attention")}
    base |= norms | {"model.norm.weight": torch.ones(8)}
    made = {
        key: {name: (one + 0.1 * torch.randn(one.shape, generator=generator)).to(dtype) for name, one in base.items()}
        for key in KEYS
    }
    made["vlm"] |= {"visual.empty": torch.zeros(0, 4), "visual.scale": torch.tensor(3.0)}
    made["vlm"]["visual.eight"] = torch.randn(4, 4, generator=generator).to(torch.float8_e4m3fn)
    return made


def write(folder: Path, tensors: Models) -> None:
    for key, weights in tensors.items():
        (folder / key).mkdir(parents=True)
        save_file({name: one.contiguous() for name, one in weights.items()}, folder / key / "model.safetensors")
        config = {"model_type": "qwen2_5_vl" if key == "vlm" else "qwen2", "tie_word_embeddings": True}
        (folder / key / "config.json").write_text(json.dumps(config))


def run(folder: Path, tensors: Models, method: str, *, clamp: bool = False, **options: Any) -> Receipt:
    """Merge; FRISM and curvature with gates half open, which nobody learned."""
    write(folder, tensors)
    recipe = {key: str(folder / key) for key in KEYS} | {"output": {"overflow": "clamp" if clamp else "refuse"}}
    chosen = {"name": method, **(options or OPTIONS.get(method, {}))}
    if method not in GATED:
        return merge({**recipe, "method": chosen}, folder / "out")
    needed = {"calibration": {"data": "none"}} | ({"kl_budget": 0.1} if method == "curvature" else {})
    load_recipe({**recipe, "method": chosen | needed})  # it is a method of the registry with a recipe
    alignment = align(*(open_checkpoint(folder / key) for key in KEYS))
    store = decompose(alignment, folder / "factors")
    gates = constant_gates({name: len(factors.s) for name, factors in store.items()}, 0.0, 1.0)
    return merge_tensors(alignment, GatedFold(store, gates), folder / "out", clamp=clamp)


def merged(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "out" / "model.safetensors")


def each(name: str, value: Tensor | Callable[[Tensor], Tensor]) -> Change:
    """The same change of one tensor in all models."""

    def change(tensors: Models) -> None:
        for weights in tensors.values():
            found = value(weights[name]) if callable(value) else value
            weights[name] = found.to(weights[name].dtype)

    return change


def subnormal(tensors: Models) -> None:
    for weights in tensors.values():
        weights[Q] = weights[Q] * 1e-39


def no_change(tensors: Models) -> None:
    tensors["donor"][Q] = tensors["donor_base"][Q].clone()


def one_direction(tensors: Models) -> None:
    tensors["donor"][Q] = tensors["donor_base"][Q] + torch.outer(torch.arange(8.0), torch.ones(8)).to(torch.bfloat16)


def equal_values(tensors: Models) -> None:
    turned = torch.linalg.qr(torch.randn(8, 8, generator=torch.Generator().manual_seed(1))).Q
    tensors["donor_base"][Q] = torch.zeros(8, 8, dtype=torch.bfloat16)
    tensors["donor"][Q] = turned.bfloat16()


ODD: dict[str, Change] = {
    "subnormal": subnormal,
    "zero": each(Q, torch.zeros(8, 8)),
    "no task vector in one matrix": no_change,
    "rank one": one_direction,
    "equal singular values": equal_values,
    "single row": each(Q, lambda one: one[:1]),
    "single column": each(OUT, lambda one: one[:, :1]),
    "one number": each(UP, lambda one: one[:1, :1]),
    "large": each(Q, lambda one: one * 1e18),
}


@pytest.mark.parametrize("odd", ODD)
@pytest.mark.parametrize("method", METHODS)
def test_odd_numbers_merge(method: str, odd: str, tmp_path: Path) -> None:
    tensors = models()
    ODD[odd](tensors)
    run(tmp_path, tensors, method)
    found = merged(tmp_path)
    assert {name: one.shape for name, one in found.items()} == {n: one.shape for n, one in tensors["vlm"].items()}
    assert all(one.float().isfinite().all() for one in found.values())
    for name in ("visual.empty", "visual.scale", "visual.eight"):
        assert torch.equal(found[name].float(), tensors["vlm"][name].float())
    if odd == "no task vector in one matrix" and method in (*GATED, "task_arithmetic", "spectral"):
        assert torch.equal(found[Q], tensors["vlm"][Q])
    if odd == "equal singular values" and method in GATED:  # any rotation inside their space is as good
        half = tensors["vlm"][Q].float() + 0.5 * tensors["donor"][Q].float()
        assert (found[Q].float() - half).abs().max() <= 2**-7 * half.abs().max()


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("method", METHODS)
def test_nan_and_infinity_are_named(method: str, bad: float, tmp_path: Path) -> None:
    for key in ("vlm", "donor", *(["donor_base"] if method != "linear" and method != "layer_swap" else [])):
        tensors = models()
        tensors[key][Q][3, 5] = bad
        folder = tmp_path / key
        # gates are learned after a check of all weights, which this test does not go through
        with pytest.raises(
            NumericalError if method in GATED else WeightsError, match=f"{Q} in .*{key}/model.safetensors"
        ) as said:
            run(folder, tensors, method)
        assert not (folder / "out").exists() and (method in GATED or said.value.exit_code == 2)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64, torch.bfloat16, torch.float8_e5m2])
def test_what_is_kept_is_counted_too(dtype: torch.dtype, tmp_path: Path) -> None:
    """Kept and excluded tensors are copied; the copy looks at their values."""
    for name in ("visual.patch", "model.embed_tokens.weight"):
        tensors = models(torch.bfloat16)
        odd = torch.ones(5, 400).to(dtype)
        odd[3, 399], odd[4, 0], odd[0, 0] = float("inf"), float("nan"), 3e4
        tensors["vlm"] |= {name: odd if name == "visual.patch" else odd[:, :8].bfloat16()}
        if name != "visual.patch":
            tensors = {key: {**weights, name: odd[:, :8].bfloat16()} for key, weights in tensors.items()}
        count = 2 if name == "visual.patch" else 1
        folder = tmp_path / name
        with pytest.raises(WeightsError, match=rf"{name} in .*, and {count} of its values are NaN or infinite") as said:
            run(folder, tensors, "task_arithmetic")
        assert said.value.exit_code == 2 and not (folder / "out").exists()
        recipe = {key: str(folder / key) for key in KEYS} | {"output": {"allow_nonfinite": True}}
        receipt = merge({**recipe, "method": "task_arithmetic"}, folder / "out")
        assert {row.name: row.nonfinite for row in receipt.tensors if row.nonfinite} == {name: count}
        assert any(note.startswith(f"{name}: {count} values are NaN") for note in receipt.notes)
        written = merged(folder)[name].contiguous().view(torch.uint8)
        assert written.equal(tensors["vlm"][name].contiguous().view(torch.uint8))


def test_large_finite_values_are_kept(tmp_path: Path) -> None:
    """Their squares are beyond float32, they are not."""
    tensors = models()
    tensors["vlm"]["visual.large"] = torch.full((9,), 3e38)
    assert not any(row.nonfinite for row in run(tmp_path, tensors, "task_arithmetic").tensors)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("other", [torch.float16, torch.float32, torch.bfloat16])
def test_dtypes_mix_and_the_vlms_is_written(dtype: torch.dtype, other: torch.dtype, tmp_path: Path) -> None:
    tensors = models(dtype)
    for key in KEYS[1:]:
        tensors[key] = {name: one.to(other) for name, one in tensors[key].items()}
    run(tmp_path, tensors, "task_arithmetic")
    wanted = tensors["vlm"][Q].float() + (tensors["donor"][Q].float() - tensors["donor_base"][Q].float())
    assert torch.equal(merged(tmp_path)[Q], wanted.to(dtype))


@pytest.mark.parametrize("key", ["vlm", "donor", "donor_base"])
@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.int8])
def test_eight_bits_are_refused_where_they_would_be_merged(key: str, dtype: torch.dtype, tmp_path: Path) -> None:
    tensors = models()
    tensors[key][Q] = tensors[key][Q].to(dtype)
    with pytest.raises(AlignmentError, match=f"{Q}: stored as .*{key}.*take the checkpoint in BF16"):
        run(tmp_path, tensors, "task_arithmetic")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("method", METHODS)
def test_overflow_on_the_cast_is_refused_or_clamped(method: str, tmp_path: Path) -> None:
    def overflowing() -> Models:
        tensors = models(torch.float16)
        tensors["vlm"][Q][0, 0] = 60_000.0
        tensors["vlm_base"][Q][0, 0] = 60_000.0
        for key in ("donor", "donor_base"):
            tensors[key] = {name: one.float() for name, one in tensors[key].items()}
        tensors["donor"][Q][0, 0] = 2e6
        return tensors

    options: dict[str, Any] = {
        "ties": {"density": 1.0},
        "dare_linear": {"density": 1.0},
        "dare_ties": {"density": 1.0},
        "della": {"density": 1.0},
        "breadcrumbs": {"density": 1.0},
        "slerp": {"t": 0.5},
        "frank": {"decay": 0.5},
        "ip_merging": {"threshold": 0.0, "rank": 8},
        "linear": {"vlm_weight": 0.5},
        "layer_swap": {"vlm_weight": 0.5, "keep_layers": "0"},
    }.get(method, {})
    try:
        receipt = run(tmp_path / "no", overflowing(), method, **options)
    except NumericalError as error:
        assert f"{Q} of " in str(error) and "overflow F16" in str(error) and "overflow: clamp" in str(error)
        assert str(tmp_path / "no" / "vlm" / "model.safetensors") in str(error)
        assert not (tmp_path / "no" / "out").exists()
    else:
        assert method in ("ip_merging", "frank", "layer_swap", "model_stock"), (
            "the others do not shrink or leave out this task vector"
        )
        assert not any(row.clamped for row in receipt.tensors)
        return
    receipt = run(tmp_path / "yes", overflowing(), method, clamp=True, **options)
    found = merged(tmp_path / "yes")[Q]
    row = next(row for row in receipt.tensors if row.name == Q)
    assert row.clamped == int((found.abs() == 65504).sum()) > 0 and found.isfinite().all()
    assert any(f"{Q}: {row.clamped} values clamped" in note for note in receipt.notes)
    written = json.loads((tmp_path / "yes" / "out" / "receipt.json").read_text())
    assert [one["clamped"] for one in written["tensors"] if one["name"] == Q] == [row.clamped]


def fail(*_: Any, **__: Any) -> Any:
    raise torch.linalg.LinAlgError("did not converge")  # type: ignore[attr-defined]


def test_an_svd_that_does_not_converge_falls_back_and_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, models())
    alignment = align(*(open_checkpoint(tmp_path / key) for key in KEYS))
    known = decompose(alignment, tmp_path / "known")
    monkeypatch.setattr(svd, "_gram_basis", fail)
    for route in ("gesdd", "gesvd"):
        with pytest.warns(RuntimeWarning, match=f"{Q}: the fast SVD did not converge; decomposed by LAPACK's {route}"):
            store = decompose(alignment, tmp_path / route)
        with safe_open(tmp_path / route / f"{Q}.safetensors", "pt") as file:
            assert file.metadata()["route"] == route
        assert store[Q].route == route and torch.allclose(store[Q].update(), known[Q].update(), atol=1e-6)
        assert torch.allclose(store[Q].s, known[Q].s, rtol=1e-5)
        monkeypatch.setattr(torch.linalg, "svd", fail)
    monkeypatch.setattr(scipy.linalg, "svd", fail_in_scipy)
    with pytest.raises(NumericalError, match=r"proj\.weight: its SVD does not converge .*leave it out of `modules`"):
        decompose(alignment, tmp_path / "neither")
    assert not (tmp_path / "neither" / "factors.json").exists()


def fail_in_scipy(*_: Any, **__: Any) -> Any:
    raise scipy.linalg.LinAlgError("did not converge")


def test_experts_whose_svd_does_not_converge_are_decomposed_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    stack = torch.randn(3, 6, 5, generator=torch.Generator().manual_seed(0))
    monkeypatch.setattr(torch.linalg, "eigh", fail)
    found = decompose_stack(stack)
    assert found.route == "gram, 3 alone" and torch.allclose((found.U * found.s[:, None]) @ found.Vh, stack, atol=1e-5)


def test_singular_values_beyond_float32_are_named() -> None:
    with pytest.raises(NumericalError, match="w: its singular values are beyond float32"):
        svd.decompose_matrix(torch.full((4, 4), 3e38), name="w")
