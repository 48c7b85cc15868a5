"""Dequantises tensors to matrices, one at a time."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from vlmgraft.checkpoint.adapter import Adapted
from vlmgraft.checkpoint.ggml import Ggml, gguf_matrix
from vlmgraft.checkpoint.header import Packed, TensorInfo
from vlmgraft.checkpoint.packed import Coded
from vlmgraft.errors import CheckpointError

FP4 = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0])
"""The values of FP4 (one sign, two exponent bits, one mantissa bit), indexed by their bits."""


def dequantise(packed: Packed, read: Callable[[TensorInfo], Tensor]) -> Tensor:
    """The matrix in float32: (values − zero point) · scale, or with an adapter values + scaling · B · A.

    Args:
        read: reads a tensor from disk.
    Raises:
        CheckpointError: the scales do not fit the values.
    """
    info = packed.parts["values"]
    values = read(info)
    if isinstance(packed, Adapted):
        product = read(packed.parts["B"]).float() @ read(packed.parts["A"]).float()
        return torch.add(values.float(), product.T if packed.turned else product, alpha=packed.scaling)
    if isinstance(packed, Ggml):
        return torch.tensor(gguf_matrix(packed, values.numpy()))
    zero = read(packed.parts["zero_point"]) if "zero_point" in packed.parts else None
    if packed.bits is not None:
        values = unpacked(values, packed.bits)
        if zero is not None and zero.dtype == torch.int32:
            zero = unpacked(zero.T.contiguous(), packed.bits).T[: len(values)]
    scale, groups = read(packed.parts["scale"]), None
    if scale.dtype == torch.uint8:  # E8M0: exponents of two
        scale = (scale.float() - 127).exp2()
    if "g_idx" in packed.parts and int((index := read(packed.parts["g_idx"])).min()) >= 0:
        groups = index.long()
    try:
        if isinstance(packed, Coded):
            return decoded(packed, values, read)
        moved = values.float() if zero is None else values.float() - spread(zero.float(), values.shape, packed, groups)
        return moved * spread(scale.float() * packed.unit, values.shape, packed, groups)
    except (RuntimeError, IndexError) as error:
        raise CheckpointError(
            f"{info.file}: {info.name} of shape {list(info.shape)} does not go with scales of {list(scale.shape)} "
            f"({error!s:.80}); download the checkpoint again"
        ) from None


def decoded(packed: Coded, values: Tensor, read: Callable[[TensorInfo], Tensor]) -> Tensor:
    """The matrix whose values are 4-bit indices into a table: bitsandbytes' own, or FP4's."""
    scale, values = read(packed.parts["scale"]), values.view(torch.uint8)
    if "table" not in packed.parts:  # mxfp4: the low half of a byte comes first
        codes = torch.stack([values & 15, values >> 4], -1).flatten(-2).long()
        return (FP4[codes] * (scale.float() - 127).exp2().unsqueeze(-1)).flatten(-2).transpose(1, 2)
    length, of_scales = packed.block or (1, 1)
    codes = torch.stack([values >> 4, values & 15], -1).flatten()[: math.prod(packed.shape)].long()
    if "scale_table" in packed.parts:
        outer = read(packed.parts["scale_scale"]).float().repeat_interleave(of_scales)[: scale.numel()]
        scale = read(packed.parts["scale_table"]).float()[scale.long()] * outer + packed.offset
    table, scale = read(packed.parts["table"]).float(), scale.float().repeat_interleave(length)[: len(codes)]
    return (table[codes] * scale).reshape(packed.shape)


def spread(scale: Tensor, shape: torch.Size, packed: Packed, groups: Tensor | None = None) -> Tensor:
    """Expand the scales of a matrix, of rows, of blocks or of column groups so that they broadcast over `shape`.

    The last blocks may extend beyond the matrix. groups: the group of each column, if these are not in group order.
    """
    if scale.numel() == 1:
        return scale.reshape(())
    if scale.ndim < len(shape):
        scale = scale.reshape(*scale.shape, *[1] * (len(shape) - scale.ndim))
    if groups is not None:
        return scale[..., groups]
    for axis, blocks in zip((-2, -1), packed.block or (0, 0), strict=True):
        count, length = scale.shape[axis], shape[axis]
        if count not in (1, length):
            size = blocks if blocks and -(-length // blocks) == count else length // count
            scale = scale.repeat_interleave(size, axis).narrow(axis, 0, length)
    return scale


def unpacked(words: Tensor, bits: int) -> Tensor:
    """Unpack int32 words into int8 values [rows, columns · 32 / bits], lowest bits first. compressed-tensors stores
    each value plus half its range."""
    shifts = torch.arange(0, 32, bits, dtype=torch.int32)
    values = (words.unsqueeze(-1) >> shifts) & (2**bits - 1)
    return (values.flatten(-2) - 2 ** (bits - 1)).to(torch.int8)
