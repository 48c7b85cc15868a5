"""How pieces are merged: ranges and threads change no bit, the cast, values that are not finite or too large."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from merge_builders import EXPERTS, SIDE, aligned, build, build_experts, bytes_in, facts_in, tensors_in
from safetensors.torch import load_file, save_file

from vlmgraft.errors import NumericalError, WeightsError
from vlmgraft.merging import engine, merge_tensors
from vlmgraft.merging.plan import CHUNK
from vlmgraft.methods.linear import Linear
from vlmgraft.methods.task_arithmetic import TaskArithmetic

Q = "model.layers.0.self_attn.q_proj.weight"


def change(folder: Path, name: str, index: tuple[int, ...], value: float) -> None:
    """Set one element of a tensor on disk."""
    weights = load_file(folder / "model.safetensors")
    weights[name][index] = value
    save_file(weights, folder / "model.safetensors")


def test_neither_threads_nor_shards_nor_ranges_change_a_bit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    build(tmp_path)
    made, facts = [], []
    for number, (threads, step) in enumerate([(1, engine.RANGE), (2, CHUNK), (5, CHUNK)]):
        monkeypatch.setattr(engine, "RANGE", step)
        merge_tensors(aligned(tmp_path), TaskArithmetic(0.3), tmp_path / f"out{number}", threads=threads)
        made.append(bytes_in(tmp_path / f"out{number}"))
        facts.append(facts_in(tmp_path / f"out{number}"))
    assert made[0] == made[1] == made[2] and facts[0] == facts[1] == facts[2]
    merge_tensors(aligned(tmp_path), TaskArithmetic(0.3), tmp_path / "cut", shard_size=1)
    assert len(list((tmp_path / "cut").glob("*.safetensors"))) == len(tensors_in(tmp_path / "vlm"))
    whole, cut = tensors_in(tmp_path / "out0"), tensors_in(tmp_path / "cut")
    assert set(whole) == set(cut) and all(torch.equal(whole[name], cut[name]) for name in whole)
    assert facts_in(tmp_path / "cut") == facts[0]


def test_the_cast_rounds_to_nearest_even(tmp_path: Path) -> None:
    build(tmp_path)
    vlm, donor = (load_file(tmp_path / key / "model.safetensors") for key in ("vlm", "donor"))
    step = 2.0**-7
    vlm[Q][0, :4] = torch.tensor([1.0, 1.0 + step, 1.0, 2.0**-130])
    donor[Q][0, :4] = torch.tensor([1.0 + step, 1.0 + 2 * step, 1.0 + step, 2.0**-129])
    save_file(vlm, tmp_path / "vlm" / "model.safetensors")
    save_file(donor, tmp_path / "donor" / "model.safetensors")
    merge_tensors(aligned(tmp_path, modules=["attention"]), Linear(0.5), tmp_path / "out")
    found = tensors_in(tmp_path / "out")[Q][0, :4].float()
    assert found.tolist() == [1.0, 1.0 + 2 * step, 1.0, 1.5 * 2.0**-130]  # ties to even, subnormals kept


@pytest.mark.parametrize("threads", [1, 3])
def test_single_experts_go_into_fused_ones(threads: int, tmp_path: Path) -> None:
    build_experts(tmp_path)
    merge_tensors(aligned(tmp_path), TaskArithmetic(0.5), tmp_path / "out", threads=threads)
    vlm, donor, base, out = (tensors_in(tmp_path / key) for key in ("vlm", "donor", "donor_base", "out"))
    gate_up = "model.language_model.layers.0.mlp.experts.gate_up_proj"
    assert vlm[gate_up].numel() > CHUNK
    for expert in range(EXPERTS):
        names = [f"model.layers.0.mlp.experts.{expert}.{half}_proj.weight" for half in ("gate", "up")]
        tau = torch.cat([donor[name].float() - base[name].float() for name in names]).T
        expected = torch.add(vlm[gate_up][expert].float(), tau, alpha=0.5).bfloat16()
        assert tau.shape[0] == SIDE and torch.equal(out[gate_up][expert], expected)


@pytest.mark.parametrize("resume", [False, True])
@pytest.mark.parametrize("where", ["vlm", "donor", "donor_base"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_weights_that_are_not_finite_are_refused(value: float, where: str, resume: bool, tmp_path: Path) -> None:
    build(tmp_path)
    change(tmp_path / where, Q, (SIDE - 1, SIDE - 1), value)  # in the last chunk
    said = rf"{Q} in .*/{where}/model.safetensors \({where}\): holds NaN or infinity"
    with pytest.raises(WeightsError, match=said) as raised:
        merge_tensors(aligned(tmp_path), TaskArithmetic(), tmp_path / "out", resume=resume)
    assert raised.value.exit_code == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["donor", "donor_base", "vlm"]


def test_infinity_in_donor_and_base_does_not_cancel(tmp_path: Path) -> None:
    build(tmp_path)
    for key in ("donor", "donor_base"):
        change(tmp_path / key, Q, (0, 0), math.inf)
    with pytest.raises(WeightsError, match=r"\(donor\): holds NaN or infinity"):
        merge_tensors(aligned(tmp_path), TaskArithmetic(), tmp_path / "out")


def test_huge_finite_weights_are_not_refused(tmp_path: Path) -> None:
    build(tmp_path)
    change(tmp_path / "donor", Q, (0, 0), 2.0**100)  # its square is beyond float32
    merge_tensors(aligned(tmp_path), TaskArithmetic(), tmp_path / "out")
    assert tensors_in(tmp_path / "out")[Q][0, 0] == 2.0**100
    (row,) = (row for row in facts_in(tmp_path / "out") if row["name"] == Q)
    assert math.isclose(row["task_vector"], 2.0**100, rel_tol=1e-6)


def test_overflow_of_float16_names_the_tensor(tmp_path: Path) -> None:
    build(tmp_path)
    vlm = {name: tensor.half() for name, tensor in load_file(tmp_path / "vlm" / "model.safetensors").items()}
    save_file(vlm, tmp_path / "vlm" / "model.safetensors")
    change(tmp_path / "donor", Q, (1, 1), 60_000)
    merge_tensors(aligned(tmp_path), TaskArithmetic(1.0), tmp_path / "fits")
    assert tensors_in(tmp_path / "fits")[Q].isfinite().all()
    with pytest.raises(NumericalError, match=rf"{Q} of .*merged values overflow F16 .*use a smaller scale") as raised:
        merge_tensors(aligned(tmp_path), TaskArithmetic(2.0), tmp_path / "out")
    assert raised.value.exit_code == 1 and not (tmp_path / "out").exists() and not list(tmp_path.glob(".*"))


@pytest.mark.parametrize(
    ("dtype", "count"),
    [
        (torch.float32, 3),
        (torch.float16, 3),
        (torch.bfloat16, 3),
        (torch.float64, 3),
        (torch.float8_e5m2, 3),
        (torch.complex64, 3),
        (torch.int32, 0),
    ],
)
def test_values_that_are_not_finite_are_counted_in_every_dtype(dtype: torch.dtype, count: int) -> None:
    """NaN, infinity and minus infinity among 70,000 values, more than one piece of the count."""
    values = torch.ones(70_000)
    raw = values.to(dtype)
    assert engine.count_nonfinite(raw.view(torch.uint8), dtype) == 0
    if count:
        raw[[0, 65_536, 69_999]] = torch.tensor([math.nan, math.inf, -math.inf]).to(dtype)
    assert engine.count_nonfinite(raw.view(torch.uint8), dtype) == count


def test_the_largest_finite_values_are_no_infinity() -> None:
    """The norm of a piece is beyond float32 here, and every value is finite."""
    raw = torch.full((4_000,), torch.finfo(torch.float32).max)
    assert engine.count_nonfinite(raw.view(torch.uint8), torch.float32) == 0
