"""A merge against the same formula on whole tensors, its identities, and what it refuses."""

from __future__ import annotations

import math
from inspect import signature
from pathlib import Path

import pytest
import torch
from merge_builders import aligned, build, facts_in, tensors_in
from safetensors.torch import load_file, save_file

from vlmgraft.alignment import align
from vlmgraft.checkpoint.index import open_checkpoint
from vlmgraft.errors import AlignmentError, CheckpointError, OutputError, VlmgraftError
from vlmgraft.merging import merge_tensors, plan_merge
from vlmgraft.methods.linear import Linear
from vlmgraft.methods.task_arithmetic import TaskArithmetic


@pytest.mark.parametrize(("threads", "shard_size"), [(1, 10**9), (3, 200_000)])
@pytest.mark.parametrize("scale", [0.0, 0.7])
def test_task_arithmetic(scale: float, threads: int, shard_size: int, tmp_path: Path) -> None:
    build(tmp_path)
    alignment = aligned(tmp_path)
    merge_tensors(alignment, TaskArithmetic(scale), tmp_path / "out", threads=threads, shard_size=shard_size)
    vlm, donor, base, merged = (tensors_in(tmp_path / key) for key in ("vlm", "donor", "donor_base", "out"))
    picked = {tensor.name for tensor in alignment.merged}
    assert len(picked) == 7 and set(merged) == set(vlm)
    for name, tensor in merged.items():
        if name in picked and scale:
            tau = donor[name].float() - base[name].float()
            assert torch.equal(tensor, torch.add(vlm[name].float(), tau, alpha=scale).bfloat16())
        else:
            assert tensor.dtype == vlm[name].dtype and torch.equal(tensor, vlm[name])
    for row in facts_in(tmp_path / "out"):
        if row["name"] not in picked:
            assert row["added"] == 0 and row["task_vector"] is None
            continue
        tau = (donor[row["name"]].double() - base[row["name"]].double()).norm().item()
        assert math.isclose(row["task_vector"], tau, rel_tol=1e-6)
        assert math.isclose(row["added"], scale * tau, rel_tol=1e-5)


def test_a_shorter_vocabulary_leaves_the_other_rows(tmp_path: Path) -> None:
    build(tmp_path, rows=500, donor_rows=300)
    alignment = aligned(tmp_path, modules=["embeddings"])
    merge_tensors(alignment, TaskArithmetic(), tmp_path / "out")
    name = "model.embed_tokens.weight"
    vlm, donor, base, out = (tensors_in(tmp_path / key)[name] for key in ("vlm", "donor", "donor_base", "out"))
    assert torch.equal(out[:300], (vlm[:300].float() + (donor.float() - base.float())).bfloat16())
    assert torch.equal(out[300:], vlm[300:])
    build(tmp_path / "longer", rows=300, donor_rows=500)
    merge_tensors(aligned(tmp_path / "longer", modules=["embeddings"]), Linear(0.0), tmp_path / "longer" / "out")
    longer = tensors_in(tmp_path / "longer" / "donor")[name]
    assert torch.equal(tensors_in(tmp_path / "longer" / "out")[name], longer[:300])


def test_refusals_leave_nothing(tmp_path: Path) -> None:
    build(tmp_path)
    save_file(load_file(tmp_path / "donor" / "model.safetensors"), tmp_path / "donor_base" / "model.safetensors")
    refused: list[tuple[type[VlmgraftError], str, str]] = [
        (AlignmentError, "out", "task vector is zero"),
        (OutputError, "vlm", "is the input"),
        (OutputError, "donor/inside", "lies inside it"),
    ]
    for error, out, said in refused:
        for resume in (False, True):
            with pytest.raises(error, match=said) as raised:
                merge_tensors(aligned(tmp_path), TaskArithmetic(), tmp_path / out, resume=resume)
            assert raised.value.exit_code == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["donor", "donor_base", "vlm"]
    assert not (tmp_path / "donor" / "inside").exists()


def test_a_method_without_its_base_is_refused(tmp_path: Path) -> None:
    build(tmp_path)
    alignment = align(*(open_checkpoint(tmp_path / key) for key in ("vlm", "donor")))
    with pytest.raises(AlignmentError, match="donor_base: method task_arithmetic needs it"):
        merge_tensors(alignment, TaskArithmetic(), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_shard_has_five_gigabytes_in_plan_and_merge() -> None:
    defaults = [signature(function).parameters["shard_size"].default for function in (plan_merge, merge_tensors)]
    assert defaults == [5 * 10**9] * 2


def test_a_shard_that_is_missing_or_gets_shorter(tmp_path: Path) -> None:
    build(tmp_path)
    merge_tensors(aligned(tmp_path), TaskArithmetic(), tmp_path / "sharded", shard_size=200_000)
    shard = sorted((tmp_path / "sharded").glob("*.safetensors"))[1]
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-2])
    with pytest.raises(CheckpointError, match=rf"{shard.name}: truncated"):
        open_checkpoint(tmp_path / "sharded")
    shard.unlink()
    with pytest.raises(CheckpointError, match=rf"{shard.name}: missing"):
        open_checkpoint(tmp_path / "sharded")
    alignment = aligned(tmp_path)
    file = tmp_path / "donor" / "model.safetensors"
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])  # after its header was read
    with pytest.raises(CheckpointError, match=r"donor/model.safetensors: ends inside .*; it got shorter"):
        merge_tensors(alignment, TaskArithmetic(), tmp_path / "out")
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".*"))
