"""A merge with quantised inputs is the merge with copies of them that were dequantised before."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from zoo import Trio

from vlmgraft import merge
from vlmgraft.alignment import align
from vlmgraft.checkpoint.index import open_checkpoint
from vlmgraft.errors import AlignmentError

Trios = Callable[[str], Trio]
SETTINGS = {"quant_method": "fp8", "activation_scheme": "dynamic"}


def quantised(folder: Path, out: Path) -> tuple[Path, Path]:
    """The folder with its layers' matrices in FP8 with a scale a row, and with those matrices dequantised in bf16."""
    tensors, packed, plain = load_file(folder / "model.safetensors"), {}, {}
    for name, tensor in tensors.items():
        packed[name] = plain[name] = tensor
        if "layers." in name and "proj.weight" in name and "vision" not in name:
            scale = tensor.float().abs().amax(1, keepdim=True) / 448
            packed[name] = (tensor.float() / scale).to(torch.float8_e4m3fn)
            packed[f"{name}_scale_inv"] = scale
            plain[name] = (packed[name].float() * scale).to(torch.bfloat16)
    for tensors, kind in ((packed, "fp8"), (plain, "plain")):
        shutil.copytree(folder, out / kind)
        save_file(tensors, out / kind / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (out / "fp8" / "config.json").write_text(json.dumps({**config, "quantization_config": SETTINGS}))
    return out / "fp8", out / "plain"


@pytest.mark.parametrize("role", ["vlm", "donor"])
def test_merged_as_from_a_dequantised_copy(role: str, trio: Trios, tmp_path: Path) -> None:
    folders = trio("llava_next_mistral")
    models = {key: str(getattr(folders, key)) for key in ("vlm", "donor", "donor_base")}
    merged = []
    for kind, path in zip(("fp8", "plain"), quantised(Path(models[role]), tmp_path), strict=True):
        recipe = {**models, role: str(path), "method": {"name": "task_arithmetic", "scale": 0.5}}
        receipt = merge(recipe, tmp_path / f"out-{kind}")
        assert any("quantised by fp8" in note for note in receipt.notes) == (kind == "fp8")
        config = json.loads((tmp_path / f"out-{kind}" / "config.json").read_text())
        assert "quantization_config" not in config
        merged.append(load_file(tmp_path / f"out-{kind}" / "model.safetensors"))
    assert merged[0].keys() == merged[1].keys()
    assert all(torch.equal(tensor, merged[1][name]) for name, tensor in merged[0].items())


def test_what_is_not_read_is_refused_for_what_it_is(trio: Trios, tmp_path: Path) -> None:
    folders = trio("llava_next_mistral")
    shutil.copytree(folders.donor, tmp_path / "donor")
    tensors = load_file(folders.donor / "model.safetensors")
    module = "model.layers.0.mlp.up_proj"
    matrix = tensors.pop(f"{module}.weight")
    tensors[f"{module}.qweight"] = torch.zeros(matrix.shape[1] // 8, len(matrix), dtype=torch.int32)
    save_file(tensors, tmp_path / "donor" / "model.safetensors")
    config = json.loads((folders.donor / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "gptq", "bits": 4}
    (tmp_path / "donor" / "config.json").write_text(json.dumps(config))
    with pytest.raises(AlignmentError, match=r"quantised by gptq \(model\.layers\.0.*I32.*release"):
        align(open_checkpoint(folders.vlm), open_checkpoint(tmp_path / "donor"))
