"""Quantised weights presented as the matrices that they encode, from headers and quantization_config alone; no torch.

| quant_method       | on disk                                               | the matrix                          |
|--------------------|-------------------------------------------------------|-------------------------------------|
| fp8, fbgemm_fp8    | X in FP8, X_scale_inv or X_scale                      | X · scale of its block, row or all  |
| compressed-tensors | X in FP8 or int8, X_scale, X_zero_point               | (X − zero point) · scale            |
| compressed-tensors | X_packed int32 of 4 or 8 bits a value, X_scale, …     | the same (`pack-quantized`)         |
| bitsandbytes       | X int8, SCB; X uint8 of two values, X.absmax, …       | X · SCB / 127; table[X] · absmax    |
| mxfp4              | X_blocks uint8 of two values, X_scales                | (table[X] · 2^(scale − 127))ᵀ       |

A matrix has the name, shape and dtype of the unquantised model; `checkpoint/dequantise.py` computes it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from vlmgraft.checkpoint.files import parse_json
from vlmgraft.checkpoint.header import ITEM_SIZES, QUANTISED, Packed, TensorInfo
from vlmgraft.errors import CheckpointError

READ = ("fp8", "fbgemm_fp8", "compressed-tensors")
"""Values of quant_method that store a matrix as one tensor with its scales beside it."""
_STATE = {"scale": "absmax", "table": "quant_map", "scale_scale": "nested_absmax", "scale_table": "nested_quant_map"}
_CODES = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}
_BESIDE = ("scale", "scale_inv", "zero_point", "g_idx", "shape")
_ACTIVATIONS = (
    "weight_format",
    "input_scale",
    "input_zero_point",
    "output_scale",
    "k_scale",
    "v_scale",
    "activation_scale",
)


@dataclass(frozen=True)
class Coded(Packed):
    """A matrix of 4-bit codes, two per byte, that index a table. shape: of the matrix. bitsandbytes has parts "table"
    and "scale", and if scales are coded too, "scale_table" and "scale_scale". Its `block` counts values per scale and
    scales per outer scale; `offset` is added to decoded scales."""

    shape: tuple[int, ...] = ()
    offset: float = 0.0


def quantisation(config: Mapping[str, Any]) -> dict[str, Any]:
    """The quantization_config of a config.json or of its text model's section; {} without one."""
    sections = [config, *(section for section in config.values() if isinstance(section, dict))]
    listed = (section.get("quantization_config") for section in sections)
    return next((section for section in listed if isinstance(section, dict)), {})


def without_quantisation(config: Mapping[str, Any]) -> dict[str, Any]:
    """A config.json without any quantization_config."""
    plain = {key: value for key, value in config.items() if key != "quantization_config"}
    return {key: without_quantisation(value) if isinstance(value, dict) else value for key, value in plain.items()}


def quantised_like(config: Mapping[str, Any], layout: Mapping[str, Any]) -> dict[str, Any]:
    """A config.json with the quantization_config of `layout`, in the same section."""
    inside = {
        key: quantised_like(value, layout[key])
        for key, value in config.items()
        if isinstance(value, dict) and isinstance(layout.get(key), dict)
    }
    own = {"quantization_config": layout["quantization_config"]} if "quantization_config" in layout else {}
    return {**config, **inside, **own}


def seen_whole(
    tensors: Mapping[str, TensorInfo], config: Mapping[str, Any], read: Callable[[TensorInfo], bytes] = lambda info: b""
) -> tuple[dict[str, TensorInfo], dict[str, Packed]]:
    """The tensors as they would be unquantised, and how the quantised ones are stored; both by name.

    read: reads the bytes of a small tensor; gives b"" if the file is not local.
    """
    settings = quantisation(config)
    method = settings.get("quant_method")
    if method == "bitsandbytes":
        packed = dict(_bitsandbytes(tensors, read))
    elif method == "mxfp4":
        packed = dict(_mxfp4(tensors))
    elif method in READ:
        packed = dict(_packed(tensors, settings))
    else:
        packed = {}
    parts = {part.name for matrix in packed.values() for part in matrix.parts.values()}
    stems = {matrix.parts["values"].name: stem for stem, matrix in packed.items()}
    dtype = _dtype(config)
    whole: dict[str, TensorInfo] = {}
    for name, info in tensors.items():
        if name in stems:
            whole[stems[name]] = _whole(stems[name], packed[stems[name]], dtype)
        elif name not in parts and not (packed and _beside(name, packed)):
            whole[name] = info
    return whole, packed


def _bitsandbytes(
    tensors: Mapping[str, TensorInfo], read: Callable[[TensorInfo], bytes]
) -> Iterator[tuple[str, Packed]]:
    """4-bit matrices as their `quant_state` describes them, and int8 matrices with a scale per row."""
    for name, info in tensors.items():
        module = name.removesuffix("weight")
        stem, _, kind = name.partition(".quant_state.bitsandbytes__")
        if info.dtype == "I8" and f"{module}SCB" in tensors:
            yield name, Packed({"values": info, "scale": tensors[f"{module}SCB"]}, unit=1 / 127)
        elif kind and (raw := read(info)):
            state = parse_json(raw, f"{info.file}: {name}", strict=False)
            parts = {key: tensors.get(f"{stem}.{end}") for key, end in _STATE.items()}
            try:
                sizes = int(state["blocksize"]), int(state.get("nested_blocksize", 1))
                shape, offset = tuple(map(int, state["shape"])), float(state.get("nested_offset", 0))
                known = {"values": tensors[stem], "state": info}
                known |= {key: part for key, part in parts.items() if part is not None}
            except (KeyError, TypeError, ValueError):
                known, shape, sizes, offset = {}, (), (0, 0), 0.0
            if len(known) not in (4, 6) or min(sizes) < 1 or -(-math.prod(shape) // 2) != known["values"].nbytes:
                raise CheckpointError(f"{info.file}: {name} does not fit the tensors of {stem}; download it again")
            yield stem, Coded(known, sizes, shape=shape, offset=offset)


def _mxfp4(tensors: Mapping[str, TensorInfo]) -> Iterator[tuple[str, Packed]]:
    """Fused experts [experts, in, out], stored as [experts, out, in / 32, 16] bytes with one exponent per block."""
    for name, info in tensors.items():
        stem = name.removesuffix("_blocks")
        if stem != name and info.dtype == "U8" and len(info.shape) == 4 and f"{stem}_scales" in tensors:
            experts, rows, blocks, size = info.shape
            parts = {"values": info, "scale": tensors[f"{stem}_scales"]}
            yield stem, Coded(parts, shape=(experts, blocks * size * 2, rows))


def _packed(tensors: Mapping[str, TensorInfo], settings: Mapping[str, Any]) -> Iterator[tuple[str, Packed]]:
    """Every quantised matrix that has a scale."""
    block, bits = settings.get("weight_block_size"), _bits(settings)
    for name, info in tensors.items():
        stem = name.removesuffix("_packed")
        joined = stem != name and info.dtype == "I32" and len(info.shape) == 2 and bits in (4, 8)
        if not joined and info.dtype not in QUANTISED:
            continue
        parts = {key: tensors[f"{stem}_{key}"] for key in _BESIDE[:4] if f"{stem}_{key}" in tensors}
        scale = parts.pop("scale_inv", None) or parts.get("scale")
        if scale is not None:
            pair = (int(block[0]), int(block[1])) if isinstance(block, list) and len(block) == 2 else None
            yield stem, Packed({**parts, "values": info, "scale": scale}, pair, bits if joined else None)


def _bits(settings: Mapping[str, Any]) -> int | None:
    """Bits per value of compressed-tensors, if all groups of modules have the same number; else None."""
    groups = settings.get("config_groups")
    listed = groups.values() if isinstance(groups, dict) else ()
    weights = [group.get("weights") for group in listed if isinstance(group, dict)]
    numbers = {section.get("num_bits") for section in weights if isinstance(section, dict)}
    return numbers.pop() if len(numbers) == 1 else None


def _whole(name: str, packed: Packed, dtype: str) -> TensorInfo:
    values = packed.parts["values"]
    *rows, columns = values.shape
    shape = (*rows, columns * (32 // packed.bits if packed.bits else 1))
    shape = packed.shape if isinstance(packed, Coded) else shape
    whole = TensorInfo(name, dtype, shape, values.file, values.begin, 0)
    return whole._replace(nbytes=whole.elements * ITEM_SIZES[dtype])


def _beside(name: str, packed: Mapping[str, Packed]) -> bool:
    """Whether a tensor only serves quantised arithmetic: shapes, and scales of activations and of caches."""
    module, _, last = name.rpartition(".")
    return last in _ACTIVATIONS or (last == "weight_shape" and f"{module}.weight" in packed)


def _dtype(config: Mapping[str, Any]) -> str:
    """The dtype that a config names; bfloat16 if it names none."""
    sections = [config, *(section for section in config.values() if isinstance(section, dict))]
    named = (str(section.get(key)) for section in sections for key in ("dtype", "torch_dtype"))
    return next((_CODES[name] for name in named if name in _CODES), "BF16")
