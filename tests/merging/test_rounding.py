"""What survives the cast, against float64 by hand; stochastic rounding: unbiased, between neighbours, deterministic."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from merge_builders import aligned, build, facts_in, tensors_in
from torch import Tensor

from vlmgraft.merging import merge_tensors
from vlmgraft.merging.plan import plan_merge
from vlmgraft.merging.rounding import Survival, round_stochastically, survival, survival_of
from vlmgraft.methods.base import TensorContext
from vlmgraft.methods.task_arithmetic import TaskArithmetic

VALUES = torch.tensor([1.0003, -1.001, 1.0, 3.14159, -1e-3, 0.0, 65000.0, 6.2e-8, -3e-6])


def rounded(values: Tensor, dtype: torch.dtype, seed: int, start: int = 0) -> Tensor:
    out = torch.empty(len(values), dtype=dtype)
    round_stochastically(values, out, seed, TensorContext("a.weight", tuple(values.shape), 1, start=start))
    return out


@pytest.mark.parametrize("scale", [0.7, 0.003])
def test_effective_scale_noise_and_changes_are_those_of_float64(scale: float, tmp_path: Path) -> None:
    build(tmp_path)
    receipt = merge_tensors(aligned(tmp_path), TaskArithmetic(scale), tmp_path / "out")
    vlm, donor, base, merged = (tensors_in(tmp_path / key) for key in ("vlm", "donor", "donor_base", "out"))
    sums = torch.zeros(5, dtype=torch.float64)
    for row in facts_in(tmp_path / "out"):
        if row["verdict"] != "merged":
            assert row["effective"] is None and row["changed"] == 0
            continue
        name = row["name"]
        meant = scale * (donor[name].double() - base[name].double())
        written = merged[name].double() - vlm[name].double()
        effective = float((written * meant).sum() / meant.square().sum())
        noise = float((written - effective * meant).norm() / meant.norm())
        assert math.isclose(row["effective"], effective, rel_tol=1e-4)
        assert math.isclose(row["noise"], noise, rel_tol=1e-4)
        assert row["changed"] == float((written != 0).double().mean())
        parts = [(written * meant).sum(), meant.square().sum(), written.square().sum(), (written != 0).sum()]
        sums += torch.tensor([*parts, meant.numel()], dtype=torch.float64)
    along, added, squares, changed, elements = sums.tolist()
    assert receipt.effective is not None and receipt.noise is not None
    assert math.isclose(receipt.effective, along / added, rel_tol=1e-4)
    assert math.isclose(receipt.noise, math.sqrt((squares - along**2 / added) / added), rel_tol=1e-3)
    assert math.isclose(receipt.changed, changed / elements, rel_tol=1e-9)


def test_a_change_that_is_lost_is_warned_of_and_survives_stochastic_rounding(tmp_path: Path) -> None:
    build(tmp_path)
    lost = merge_tensors(aligned(tmp_path), TaskArithmetic(1e-4), tmp_path / "nearest")
    assert lost.effective is not None and lost.effective < 0.5
    assert any(note.startswith("warning: effective λ 0.") and "rounding: stochastic" in note for note in lost.notes)
    kept = merge_tensors(aligned(tmp_path), TaskArithmetic(1e-4), tmp_path / "stochastic", seed=0)
    assert kept.effective == pytest.approx(1.0, abs=0.05) and not any("effective" in note for note in kept.notes)


def test_nothing_added_has_no_effective_scale(tmp_path: Path) -> None:
    build(tmp_path)
    receipt = merge_tensors(aligned(tmp_path), TaskArithmetic(0.0), tmp_path / "out", seed=3)
    assert receipt.survival == Survival(None, None, 0.0) and "nothing" in receipt.survival.line()
    vlm, merged = tensors_in(tmp_path / "vlm"), tensors_in(tmp_path / "out")
    assert all(torch.equal(merged[name], vlm[name]) for name in vlm)


def test_the_line_says_what_the_figure_is() -> None:
    assert Survival(0.5, 0.25, 1.0).line().startswith("effective λ 0.500 (1: the whole change survived the rounding ")


def test_parts_add_up_to_the_whole() -> None:
    first, second = survival(4.0, 2.0, -2.0, 3, 10), survival(9.0, 0.0, 0.0, 10, 10)
    assert (first.effective, first.noise, second.noise) == (0.5, 0.5, 0.0)
    whole = survival_of([(2.0, first, 10), (3.0, second, 10)])
    assert whole.effective == pytest.approx(11 / 13) and whole.changed == 0.65
    assert whole.noise == pytest.approx(math.sqrt((11 - 11**2 / 13) / 13))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_stochastic_rounding_is_unbiased_and_goes_to_a_neighbour(dtype: torch.dtype) -> None:
    draws = torch.stack([rounded(VALUES, dtype, seed).double() for seed in range(4000)])
    low, high = draws.min(0).values, draws.max(0).values
    exact = VALUES.double()
    assert bool(((low <= exact) & (exact <= high)).all())
    for column, value in enumerate(VALUES):
        neighbours = draws[:, column].unique()
        if value.to(dtype).float() == value:
            assert neighbours.tolist() == [float(value)]
            continue
        assert len(neighbours) == 2
        step = float(neighbours[1] - neighbours[0])
        assert abs(float(draws[:, column].mean() - exact[column])) < 5 * step / math.sqrt(4 * 4000)
        between = torch.tensor(float(neighbours[0] + neighbours[1]) / 2, dtype=torch.float64).to(dtype).double()
        assert float(between) in neighbours.tolist(), "no value of the dtype lies between them"


def test_which_way_does_not_depend_on_how_the_tensor_is_cut() -> None:
    values = torch.randn(200_000, generator=torch.Generator().manual_seed(0))
    whole = rounded(values, torch.bfloat16, 7)
    parts = [rounded(values[at : at + 70_000], torch.bfloat16, 7, start=at) for at in (0, 70_000, 140_000)]
    assert torch.equal(whole, torch.cat(parts)) and not torch.equal(whole, rounded(values, torch.bfloat16, 8))


def test_what_is_beyond_the_dtype_is_infinite_and_float32_is_exact() -> None:
    assert rounded(torch.tensor([1e6, -1e6]), torch.float16, 0).tolist() == [math.inf, -math.inf]
    assert torch.equal(rounded(VALUES, torch.float32, 0), VALUES)


def test_neither_threads_nor_shards_change_a_bit_of_it(tmp_path: Path) -> None:
    build(tmp_path)
    tensors = []
    for threads, shard_size in ((1, 10**9), (3, 200_000)):
        out = tmp_path / f"{threads}"
        merge_tensors(aligned(tmp_path), TaskArithmetic(0.1), out, threads=threads, shard_size=shard_size, seed=5)
        tensors.append(tensors_in(out))
    assert tensors[0].keys() == tensors[1].keys()
    assert all(torch.equal(tensors[0][name], tensors[1][name]) for name in tensors[0])


def test_float32_keeps_all_of_a_change_and_leaves_the_other_tensors_as_they_are(tmp_path: Path) -> None:
    build(tmp_path)
    alignment = aligned(tmp_path)
    receipt = merge_tensors(alignment, TaskArithmetic(1e-4), tmp_path / "out", float32=True)
    assert receipt.effective == pytest.approx(1.0, abs=1e-3)
    vlm, donor, base, merged = (tensors_in(tmp_path / key) for key in ("vlm", "donor", "donor_base", "out"))
    for row in receipt.tensors:
        if row.verdict != "merged":
            assert merged[row.name].dtype == vlm[row.name].dtype and torch.equal(merged[row.name], vlm[row.name])
            continue
        assert row.dtype == "F32" and merged[row.name].dtype == torch.float32
        exact = vlm[row.name].double() + 1e-4 * (donor[row.name].double() - base[row.name].double())
        assert torch.allclose(merged[row.name].double(), exact, rtol=2e-7, atol=1e-10)
    plan = plan_merge(alignment, TaskArithmetic(1e-4), float32=True)
    assert plan.written == sum(tensor.nbytes for tensor in merged.values())
