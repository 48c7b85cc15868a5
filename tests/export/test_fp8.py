"""FP8 again: blocks by hand, the layout of the VLM's files, and a folder that verifies and that transformers loads."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText

from vlmgraft.checkpoint.header import Packed, TensorInfo
from vlmgraft.checkpoint.index import open_checkpoint
from vlmgraft.checkpoint.reader import Reader
from vlmgraft.errors import CheckpointError, OutputError
from vlmgraft.export.fp8 import quantised, write_fp8

BLOCK = (16, 32)


def packed(scales: tuple[int, ...], block: tuple[int, int] | None) -> Packed:
    info = TensorInfo("w_scale_inv", "F32", scales, Path("x"), 0, 0)
    return Packed({"values": info._replace(name="w", dtype="F8_E4M3"), "scale": info}, block)


@pytest.mark.parametrize(
    "shape, scales, block",
    [
        ((10, 13), (3, 2), (4, 8)),
        ((8, 16), (8, 1), None),
        ((8, 16), (8,), None),
        ((8, 16), (1,), None),
        ((8, 16), (), None),
        ((3, 8, 12), (3, 2, 3), (4, 4)),
    ],
)
def test_every_cell_is_scaled_by_its_largest_value(shape: Any, scales: Any, block: Any) -> None:
    matrix = torch.randn(shape)
    matrix.view(-1, shape[-1])[0] = 0
    values, scale = quantised(matrix, packed(scales, block))
    assert values.shape == matrix.shape and values.dtype == torch.float8_e4m3fn and scale.shape == torch.Size(scales)
    flat, cells = matrix.reshape(-1, *shape[-2:]), scale.reshape(shape[0] if len(shape) == 3 else 1, -1)
    rows, columns = block or (1 if scale.numel() > 1 else shape[-2], shape[-1])
    across = -(-shape[-1] // columns)
    for expert, of_expert in enumerate(flat):
        for i in range(0, shape[-2], rows):
            for j in range(0, shape[-1], columns):
                cell = of_expert[i : i + rows, j : j + columns]
                found = float(cells[expert, i // rows * across + j // columns])
                assert found == pytest.approx(float(cell.abs().max()) / 448 or 1.0)
                kept = values.reshape(flat.shape)[expert, i : i + rows, j : j + columns].float() * found
                assert ((kept - cell).abs() <= cell.abs() / 16 + found * 2**-10).all()


def test_scales_are_powers_of_two_where_the_config_says_so() -> None:
    """DeepSeek's releases since V3.1 (`scale_fmt: ue8m0`): by hand, 448 has scale 1, 449 has 2, 3.5 has 1/128."""
    matrix = torch.tensor([[448.0, 1.0], [449.0, 1.0], [3.5, 1.0], [0.0, 0.0]])
    values, scale = quantised(matrix, packed((4, 1), None), powers=True)
    assert scale.flatten().tolist() == [1.0, 2.0, 2.0**-7, 1.0]
    assert (values.float() * scale).tolist() == [[448.0, 1.0], [448.0, 1.0], [3.5, 1.0], [0.0, 0.0]]


@pytest.fixture
def layout(trio: Path, tmp_path: Path) -> Path:
    """The lab's VLM as an FP8 release keeps one: every matrix of its decoder layers in blocks."""
    folder = tmp_path / "fp8"
    shutil.copytree(trio / "vlm", folder)
    tensors = load_file(folder / "model.safetensors")
    for name in [
        name for name in tensors if ".layers." in name and name.endswith("_proj.weight") and "vision" not in name
    ]:
        rows, columns = (-(-size // by) for size, by in zip(tensors[name].shape, BLOCK, strict=True))
        tensors[name] = tensors[name].to(torch.float8_e4m3fn)
        tensors[f"{name}_scale_inv"] = torch.ones(rows, columns)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    keep = ["lm_head", "vision_tower", "multi_modal_projector"]
    config["quantization_config"] = {
        "quant_method": "fp8", "weight_block_size": list(BLOCK), "modules_to_not_convert": keep,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_a_folder_in_the_vlms_layout(trio: Path, layout: Path, tmp_path: Path, vlmgraft: Any) -> None:
    out = tmp_path / "out"
    ran = vlmgraft("export", trio / "vlm", "--to", "fp8", "--vlm", layout, "--out", out, "--json")
    assert ran.code == 0, ran.err
    error = json.loads(ran.out)["error"]
    assert 0.005 < error < 0.05
    here, there = open_checkpoint(out), open_checkpoint(layout)
    assert {n: (i.dtype, i.shape) for n, i in here.stored.items()} == {
        n: (i.dtype, i.shape) for n, i in there.stored.items()
    }
    assert len(here.packed) == len(there.packed) > 10
    assert vlmgraft("verify", out).code == 0
    lost = whole = 0.0
    with Reader(here) as quantised_, Reader(open_checkpoint(trio / "vlm")) as plain:
        for name in here.tensors:
            was, now = plain.tensor(name), quantised_.tensor(name)
            if name not in here.packed:
                assert torch.equal(was, now), name
            lost += float((now.double() - was.double()).square().sum()) if name in here.packed else 0.0
            whole += float(was.double().square().sum()) if name in here.packed else 0.0
    assert error == pytest.approx((lost / whole) ** 0.5, rel=0.05)
    loaded = AutoModelForImageTextToText.from_pretrained(out, dtype=torch.float32)
    state = loaded.state_dict()
    name = next(name for name in here.packed if name.endswith("layers.1.mlp.down_proj.weight"))
    with Reader(here) as reader:
        found = next(
            value for key, value in state.items() if key.endswith("language_model.layers.1.mlp.down_proj.weight")
        )
        assert torch.allclose(found.float(), reader.tensor(name).float(), rtol=2**-7)


def test_interrupted_it_goes_on_to_the_same_bytes(trio: Path, layout: Path, tmp_path: Path) -> None:
    def stop(done: int, *_: object) -> None:
        if done == 20:
            raise KeyboardInterrupt

    error = write_fp8(trio / "vlm", layout, tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        write_fp8(trio / "vlm", layout, tmp_path / "out", progress=stop)
    first: list[int] = []
    assert write_fp8(trio / "vlm", layout, tmp_path / "out", progress=lambda done, *_: first.append(done)) == error
    assert first[0] == 20
    for file in ("model.safetensors", "receipt.json"):
        assert (tmp_path / "out" / file).read_bytes() == (tmp_path / "whole" / file).read_bytes()


@pytest.mark.parametrize(
    "values, scale, kept",
    [
        (torch.zeros(64, 64, dtype=torch.int8), torch.ones(64, 1), "I8"),
        (torch.zeros(64, 64, dtype=torch.float8_e5m2), torch.ones(64, 1), "F8_E5M2"),
        (torch.zeros(64, 64).to(torch.float8_e4m3fn), torch.full((4, 2), 127, dtype=torch.uint8), "U8"),
    ],
)
def test_other_kinds_of_quantisation_are_named(values: Any, scale: Any, kept: str, tmp_path: Path) -> None:
    for folder, tensors in (("plain", {"w": torch.zeros(64, 64)}), ("vlm", {"w": values, "w_scale": scale})):
        (tmp_path / folder).mkdir()
        save_file(tensors, tmp_path / folder / "model.safetensors")
        config = {"model_type": "x", "quantization_config": {"quant_method": "compressed-tensors"}}
        (tmp_path / folder / "config.json").write_text(json.dumps(config if folder == "vlm" else {"model_type": "x"}))
    with pytest.raises(CheckpointError, match=f"w is kept as .*{kept}"):
        write_fp8(tmp_path / "plain", tmp_path / "vlm", tmp_path / "out")


def test_refusals(trio: Path, layout: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="keeps no matrix in FP8"):
        write_fp8(trio / "vlm", trio / "vlm", tmp_path / "out")
    with pytest.raises(CheckpointError, match="give the VLM it is of"):
        write_fp8(trio / "donor", layout, tmp_path / "out")
    with pytest.raises(OutputError, match="exists"):
        write_fp8(trio / "vlm", layout, layout)
    tensors = load_file(layout / "model.safetensors")
    name = next(name for name in tensors if name.endswith("q_proj.weight"))
    save_file(tensors | {name.replace("weight", "input_scale"): torch.ones(())}, layout / "model.safetensors")
    with pytest.raises(CheckpointError, match="input_scale was measured on the VLM's activations"):
        write_fp8(trio / "vlm", layout, tmp_path / "out")
    assert not (tmp_path / "out").exists()
