"""Quantised matrices as the libraries that define their formats dequantise them."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers.integrations.finegrained_fp8 import Fp8Dequantize
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from vlmgraft.checkpoint.dequantise import spread, unpacked
from vlmgraft.checkpoint.header import Packed
from vlmgraft.checkpoint.index import open_checkpoint
from vlmgraft.checkpoint.reader import Reader
from vlmgraft.errors import CheckpointError

FP8 = {"quant_method": "fp8", "weight_block_size": [4, 8]}


def read(folder: Path, settings: dict[str, Any], name: str = "q.weight", **tensors: torch.Tensor) -> torch.Tensor:
    """A matrix of a folder with these tensors, read whole and in pieces."""
    save_file(
        {key if "." in key else key.replace("__", "."): tensor for key, tensor in tensors.items()},
        folder / "model.safetensors",
    )
    (folder / "config.json").write_text(json.dumps({"dtype": "float32", "quantization_config": settings}))
    with Reader(open_checkpoint(folder)) as reader:
        whole = reader.tensor(name)
        pieces = [torch.empty(min(7, whole.numel() - at)) for at in range(0, whole.numel(), 7)]
        for number, piece in enumerate(pieces):
            reader.read_into(name, 7 * number, piece)
    assert torch.equal(torch.cat(pieces), whole.flatten())
    return whole


@pytest.mark.parametrize("grid", [(3, 2), (12, 1), (1, 1)])
def test_fp8_with_blocks_channels_or_one_scale_is_as_transformers_makes_it(
    grid: tuple[int, int], tmp_path: Path
) -> None:
    values, scales = torch.randn(12, 16).to(torch.float8_e4m3fn), torch.rand(grid)
    expected = Fp8Dequantize(None)._dequantize_one(values, scales, torch.float32)
    assert torch.equal(read(tmp_path, FP8, q__weight=values, q__weight_scale_inv=scales), expected)


def test_the_last_blocks_may_reach_beyond_the_matrix(tmp_path: Path) -> None:
    values, scales = torch.randn(10, 13).to(torch.float8_e4m3fn), torch.rand(3, 2)
    matrix = read(tmp_path, FP8, q__weight=values, q__weight_scale_inv=scales)
    for row in range(10):
        for column in range(13):
            assert matrix[row, column] == values.float()[row, column] * scales[row // 4, column // 8]


def test_fused_experts_have_scales_of_their_own(tmp_path: Path) -> None:
    values, scales = torch.randn(2, 8, 16).to(torch.float8_e4m3fn), torch.rand(2, 2, 2)
    expected = Fp8Dequantize(None)._dequantize_one(values, scales, torch.float32)
    tensors = {"experts__gate_up_proj": values, "experts__gate_up_proj_scale_inv": scales}
    assert torch.equal(read(tmp_path, FP8, "experts.gate_up_proj", **tensors), expected)


def test_scales_of_another_shape_are_refused(tmp_path: Path) -> None:
    values, scales = torch.randn(12, 16).to(torch.float8_e4m3fn), torch.rand(5, 7)
    with pytest.raises(CheckpointError, match=r"does not go with scales of \[5, 7\]"):
        read(tmp_path, {"quant_method": "fp8"}, q__weight=values, q__weight_scale_inv=scales)


@pytest.mark.parametrize(
    ("bits", "group", "symmetric"), [(4, 8, True), (4, 16, False), (8, None, True), (8, None, False)]
)
def test_packed_integers_are_as_they_were_packed(bits: int, group: int | None, symmetric: bool, tmp_path: Path) -> None:
    """Word by word: value number k of a row is in word k · bits // 32, plus half its range, from the lowest bits up."""
    half, columns, rows = 2 ** (bits - 1), 32, 10
    group = group or columns
    values = torch.randint(-half, half, (rows, columns))
    scales = torch.rand(rows, columns // group)
    zeros = torch.randint(-half, half, (rows, columns // group)) if not symmetric else torch.zeros_like(scales).long()

    def words(numbers: list[int]) -> list[int]:
        packed = [0] * math.ceil(len(numbers) * bits / 32)
        for at, number in enumerate(numbers):
            packed[at * bits // 32] |= (number + half) << (at * bits % 32)
        return [word - 2**32 if word >= 2**31 else word for word in packed]

    tensors = {
        "q__weight_packed": torch.tensor([words(row) for row in values.tolist()], dtype=torch.int32),
        "q__weight_scale": scales,
        "q__weight_shape": torch.tensor([rows, columns]),
    }
    if not symmetric:
        tensors["q__weight_zero_point"] = torch.tensor(
            [words(c) for c in zeros.T.tolist()], dtype=torch.int32
        ).T.contiguous()
    settings = {"quant_method": "compressed-tensors", "config_groups": {"g": {"weights": {"num_bits": bits}}}}
    matrix = read(tmp_path, settings, **tensors)
    for row in range(rows):
        for column in range(columns):
            expected = (values[row, column] - zeros[row, column // group]).float() * scales[row, column // group]
            assert matrix[row, column] == expected


def test_packed_integers_are_as_compressed_tensors_unpacks_them(tmp_path: Path) -> None:
    library = pytest.importorskip("compressed_tensors.compressors", reason="compressed-tensors is not installed")
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

    weights = QuantizationArgs(num_bits=4, strategy="group", group_size=8, symmetric=False)
    scheme = QuantizationScheme(targets=["Linear"], weights=weights)
    state = {
        "weight": torch.randn(16, 32),
        "weight_scale": torch.rand(16, 4) / 4 + 0.1,
        "weight_zero_point": torch.randint(-8, 8, (16, 4), dtype=torch.int8),
    }
    packed = library.PackedQuantizationCompressor.compress(state, scheme)
    expected = library.PackedQuantizationCompressor.decompress(packed, scheme)["weight"]
    settings = {"quant_method": "compressed-tensors", "config_groups": {"g": {"weights": {"num_bits": 4}}}}
    matrix = read(tmp_path, settings, **{f"q__{name}": tensor.contiguous() for name, tensor in packed.items()})
    torch.testing.assert_close(matrix, expected.float(), rtol=1e-6, atol=1e-6)


def test_bitsandbytes_as_the_library_made_it(tmp_path: Path) -> None:
    """NF4 with coded scales, FP4 and int8 by bitsandbytes 0.50.2, beside what its own functions dequantise."""
    tensors = load_file(Path(__file__).parent / "bitsandbytes.safetensors")
    expected = {name: tensors.pop(name) for name in list(tensors) if name.startswith("expected.")}
    for name, matrix in expected.items():
        kind = name.split(".")[1]
        parts = {key: tensor for key, tensor in tensors.items() if key.startswith(kind)}
        folder = tmp_path / kind
        folder.mkdir()
        made = read(folder, {"quant_method": "bitsandbytes"}, f"{kind}.weight", **parts)
        assert made.shape == matrix.shape and torch.allclose(made, matrix, rtol=1e-6, atol=1e-7), kind
    state = json.loads(bytes(tensors["nf4.weight.quant_state.bitsandbytes__nf4"].tolist())) | {"shape": [7, 50]}
    wrong = torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)
    parts = {key: tensor for key, tensor in tensors.items() if key.startswith("nf4")}
    with pytest.raises(CheckpointError, match=r"quant_state.*does not fit"):
        read(tmp_path, {"quant_method": "bitsandbytes"}, **{**parts, "nf4.weight.quant_state.bitsandbytes__nf4": wrong})


def test_mxfp4_as_transformers_makes_it(tmp_path: Path) -> None:
    blocks = torch.randint(0, 256, (2, 6, 3, 16), dtype=torch.uint8)
    scales = torch.randint(120, 130, (2, 6, 3), dtype=torch.uint8)
    tensors = {"mlp.experts.gate_up_proj_blocks": blocks, "mlp.experts.gate_up_proj_scales": scales}
    made = read(tmp_path, {"quant_method": "mxfp4"}, "mlp.experts.gate_up_proj", **tensors)
    assert torch.equal(made, convert_moe_packed_tensors(blocks, scales, dtype=torch.float32))


def test_words_hold_their_values_from_the_lowest_bits_up() -> None:
    """0x76543210 holds 0 to 7 in four bits each; of what is held, half of the range is taken away."""
    assert unpacked(torch.tensor([[0x76543210]], dtype=torch.int32), 4).tolist() == [[value - 8 for value in range(8)]]
    assert unpacked(torch.tensor([[0x00FF0180]], dtype=torch.int32), 8).tolist() == [[0, -127, 127, -128]]
    assert unpacked(torch.tensor([[-1]], dtype=torch.int32), 4).tolist() == [[7] * 8]


def test_scales_are_spread_over_what_they_belong_to() -> None:
    """Of 4 × 6: one for all, one a row, blocks of 2 × 4 of which the last column has half, groups in any order."""
    shape, blocks, grid = torch.Size((4, 6)), Packed({}, block=(2, 4)), torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    assert spread(torch.tensor([[5.0]]), shape, Packed({})).shape == ()
    assert spread(torch.arange(4.0), shape, Packed({})).tolist() == [[0.0], [1.0], [2.0], [3.0]]
    upper, lower = [1.0, 1.0, 1.0, 1.0, 2.0, 2.0], [3.0, 3.0, 3.0, 3.0, 4.0, 4.0]
    assert spread(grid, shape, blocks).expand(shape).tolist() == [upper, upper, lower, lower]
    groups = spread(torch.tensor([[1.0, 2.0]] * 4), shape, Packed({}), torch.tensor([1, 0, 0, 1, 1, 0]))
    assert groups[0].tolist() == [2.0, 1.0, 1.0, 2.0, 2.0, 1.0]
