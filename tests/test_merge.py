"""A merge against the same formula on whole tensors, and its identities."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from vlmgraft.alignment import Alignment, align
from vlmgraft.checkpoint.index import open_checkpoint
from vlmgraft.errors import AlignmentError, OutputError, VlmgraftError, WeightsError
from vlmgraft.merge import merge_tensors
from vlmgraft.methods.task_arithmetic import TaskArithmetic


def folders(tmp_path: Path, *, zero: bool = False, bad: bool = False) -> Alignment:
    torch.manual_seed(0)
    names = [f"model.layers.0.self_attn.{x}_proj.weight" for x in "qkvo"]
    names += [f"model.layers.0.mlp.{x}_proj.weight" for x in ("gate", "up", "down")]
    made = []
    for key in ("vlm", "donor", "base"):
        weights = {name: torch.randn(300, 300).bfloat16() for name in [*names, "model.embed_tokens.weight"]}
        weights["model.layers.0.input_layernorm.weight"] = torch.ones(300).bfloat16()
        weights["model.norm.weight"] = torch.ones(300).bfloat16()
        if key == "vlm":
            weights["visual.w.weight"] = torch.randn(3, 3)
        if key == "donor" and bad:
            weights[names[0]][0, 0] = float("nan")
        if key == "base" and zero:
            weights = load_file(tmp_path / "donor" / "model.safetensors")
        (tmp_path / key).mkdir()
        save_file(weights, tmp_path / key / "model.safetensors")
        kind = "qwen2_5_vl" if key == "vlm" else "qwen2"
        (tmp_path / key / "config.json").write_text(json.dumps({"model_type": kind, "tie_word_embeddings": True}))
        made.append(open_checkpoint(tmp_path / key))
    return align(*made)


@pytest.mark.parametrize(("threads", "shard_size"), [(1, 10**9), (3, 200_000)])
@pytest.mark.parametrize("scale", [0.0, 0.7])
def test_task_arithmetic(scale: float, threads: int, shard_size: int, tmp_path: Path) -> None:
    alignment = folders(tmp_path)
    merge_tensors(alignment, TaskArithmetic(scale), tmp_path / "out", threads=threads, shard_size=shard_size)
    vlm, donor, base = (load_file(tmp_path / key / "model.safetensors") for key in ("vlm", "donor", "base"))
    merged = {name: t for file in (tmp_path / "out").glob("*.safetensors") for name, t in load_file(file).items()}
    picked = {tensor.name for tensor in alignment.merged}
    assert len(picked) == 7 and set(merged) == set(vlm)
    for name, tensor in merged.items():
        if name in picked and scale:
            tau = donor[name].float() - base[name].float()
            assert torch.equal(tensor, torch.add(vlm[name].float(), tau, alpha=scale).bfloat16())
        else:
            assert torch.equal(tensor.view(torch.uint8), vlm[name].view(torch.uint8))
    assert len(json.loads((tmp_path / "out" / "receipt.json").read_text())["tensors"]) == len(vlm)


@pytest.mark.parametrize("resume", [False, True])
@pytest.mark.parametrize(
    ("options", "error", "said"),
    [
        ({"zero": True}, AlignmentError, "task vector is zero"),
        ({"bad": True}, WeightsError, r"q_proj.weight in .*donor/model.safetensors \(donor\): holds NaN"),
    ],
)
def test_refusals_leave_nothing(
    options: dict[str, bool], error: type[VlmgraftError], said: str, resume: bool, tmp_path: Path
) -> None:
    alignment = folders(tmp_path, **options)
    with pytest.raises(error, match=said) as raised:
        merge_tensors(alignment, TaskArithmetic(), tmp_path / "out", resume=resume)
    assert raised.value.exit_code == 2
    with pytest.raises(OutputError):
        merge_tensors(alignment, TaskArithmetic(), tmp_path / "vlm", resume=resume)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "donor", "vlm"]
