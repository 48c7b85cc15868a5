"""Which tensors are one matrix, told from headers and quantization_config."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from vlmgraft.checkpoint.header import TensorInfo
from vlmgraft.checkpoint.packed import quantisation, quantised_like, seen_whole, without_quantisation

INT4 = {"quant_method": "compressed-tensors", "config_groups": {"group_0": {"weights": {"num_bits": 4}}}}


def infos(**tensors: tuple[str, tuple[int, ...]]) -> dict[str, TensorInfo]:
    return {
        name.replace("__", "."): TensorInfo(name.replace("__", "."), dtype, shape, Path("x"), 0, 0)
        for name, (dtype, shape) in tensors.items()
    }


def seen(config: dict[str, Any], **tensors: tuple[str, tuple[int, ...]]) -> dict[str, tuple[str, tuple[int, ...]]]:
    whole, _ = seen_whole(infos(**tensors), config)
    return {name: (info.dtype, info.shape) for name, info in whole.items()}


def test_scales_and_what_only_serves_arithmetic_vanish() -> None:
    config = {"quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]}}
    whole = seen(
        config,
        q__weight=("F8_E4M3", (200, 130)),
        q__weight_scale_inv=("F32", (2, 2)),
        q__input_scale=("F32", ()),
        norm__weight=("BF16", (130,)),
    )
    assert whole == {"q.weight": ("BF16", (200, 130)), "norm.weight": ("BF16", (130,))}


def test_packed_words_have_the_width_of_their_values_and_the_configs_dtype() -> None:
    config = {"dtype": "float16", "quantization_config": INT4}
    tensors = {
        "q__weight_packed": ("I32", (6, 4)),
        "q__weight_scale": ("BF16", (6, 1)),
        "q__weight_shape": ("I64", (2,)),
    }
    assert seen(config, **tensors) == {"q.weight": ("F16", (6, 32))}
    _, packed = seen_whole(infos(**tensors), config)
    assert packed["q.weight"].error == "1/15 of the largest in its group"


def test_other_methods_are_left_as_they_are() -> None:
    tensors = {"q__weight": ("U8", (6, 4)), "q__weight_scale": ("BF16", (6, 1))}
    config = {"quantization_config": {"quant_method": "bitsandbytes"}}
    assert seen(config, **tensors) == {"q.weight": ("U8", (6, 4)), "q.weight_scale": ("BF16", (6, 1))}


def test_the_config_of_a_text_section_counts_and_is_taken_out() -> None:
    config = {"model_type": "a", "text_config": {"model_type": "b", "quantization_config": INT4}}
    assert quantisation(config) == INT4
    plain = without_quantisation(config)
    assert plain == {"model_type": "a", "text_config": {"model_type": "b"}}
    assert quantised_like(plain, config) == config
