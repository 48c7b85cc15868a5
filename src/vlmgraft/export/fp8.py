"""Writes a merged folder in FP8: matrices that the VLM stores in FP8 are quantised again in the same layout."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from vlmgraft.checkpoint.dequantise import spread
from vlmgraft.checkpoint.digests import seal_receipt
from vlmgraft.checkpoint.handles import TORCH_DTYPES
from vlmgraft.checkpoint.header import Packed, TensorSpec, read_header
from vlmgraft.checkpoint.index import Checkpoint, open_checkpoint
from vlmgraft.checkpoint.packed import quantisation, quantised_like
from vlmgraft.checkpoint.reader import Reader
from vlmgraft.checkpoint.writer import Writer
from vlmgraft.errors import CheckpointError
from vlmgraft.export.card import copy_side_files
from vlmgraft.merging.receipt import fingerprint
from vlmgraft.storage.jsonl import write_json
from vlmgraft.storage.progress import Progress

LARGEST = torch.finfo(torch.float8_e4m3fn).max
SCALES = ("F32", "BF16", "F16")


def write_fp8(
    merged: str | Path,
    vlm: str | Path,
    out: str | Path,
    *,
    shard_size: int = 5 * 10**9,
    progress: Progress | None = None,
) -> float:
    """Write the folder `merged` to the new folder `out` with the VLM's FP8 matrices in FP8 and its quantization_config.

    A scale is the largest absolute value of a block, row or matrix over 448, rounded up to a power of two if the VLM's
    scales are powers of two, so every value keeps three bits of mantissa. Other tensors are copied. Returns ‖quantised
    − merged‖ / ‖merged‖ over the quantised matrices. An interrupted run is resumed.

    Raises:
        CheckpointError: the VLM has no matrix in FP8 with scales of weights alone, or the two folders differ in tensors
            or shapes. OutputError: `out` exists or cannot be written.
    """
    source, layout = open_checkpoint(merged), open_checkpoint(vlm)
    _check(source, layout)
    specs = [spec for name in source.tensors for spec in _specs(source, layout, name)]
    powers = quantisation(layout.config).get("scale_fmt") == "ue8m0"
    key = fingerprint([*source.files, *layout.files]) + str(shard_size)
    with Reader(source) as reader, Writer(out, specs, shard_size, resume=key) as writer:
        for name in source.tensors:
            if name not in writer.done:
                writer.finish(name, _write(writer, name, reader.tensor(name), layout.packed.get(name), powers))
            if progress is not None:
                progress(len(writer.done), len(source.tensors), name)
        lost, whole = (sum(facts[part] for facts in writer.done.values()) for part in ("lost", "whole"))
        error = (lost / whole) ** 0.5 if whole else 0.0
        copy_side_files(source.path, writer.folder)
        write_json(writer.folder / "config.json", quantised_like(source.config, layout.config))
        digests = {name: digest for facts in writer.done.values() for name, digest in facts["digests"].items()}
        rows = [{**asdict(spec), "digest": digests[spec.name]} for spec in specs]
        files = [asdict(file) for file in writer.files()]
        seal_receipt(writer.folder, {"error": error, "tensors": rows, "files": files})
    return error


def _write(writer: Writer, name: str, tensor: Tensor, packed: Packed | None, powers: bool) -> dict[str, Any]:
    """Write a tensor, quantised if the VLM's is; gives digests, and the squared norms of rounding error and tensor."""
    if packed is None:
        writer.write(name, tensor)
        return {"lost": 0.0, "whole": 0.0, "digests": {name: writer.digest(name)}}
    values, scale = quantised(tensor.float(), packed, powers)
    written = {packed.parts["values"].name: values, packed.parts["scale"].name: scale}
    for part, data in written.items():
        writer.write(part, data)
    rounded = values.float() * spread(scale.float(), values.shape, packed) - tensor.float()
    lost, whole = (float(torch.linalg.vector_norm(one, dtype=torch.float64)) ** 2 for one in (rounded, tensor.float()))
    return {"lost": lost, "whole": whole, "digests": {part: writer.digest(part) for part in written}}


def quantised(matrix: Tensor, packed: Packed, powers: bool = False) -> tuple[Tensor, Tensor]:
    """FP8 values and scales, in the shapes and dtypes of `packed`, of a float32 matrix [..., rows, columns].

    powers: round scales up to powers of two (`scale_fmt: ue8m0`, which kernels store as exponents alone).
    """
    of_scales, shape = packed.parts["scale"], matrix.shape
    single = of_scales.elements == 1
    cells = [1] * len(shape) if single else [*of_scales.shape, *[1] * (len(shape) - len(of_scales.shape))]
    blocks = [0] * (len(shape) - 2) + list(packed.block or (0, 0))
    largest = matrix.abs()
    for axis, (count, length, block) in enumerate(zip(cells, shape, blocks, strict=True)):
        size = block if block and count > 1 and -(-length // block) == count else length // count
        beyond = [0, 0] * (len(shape) - 1 - axis) + [0, count * size - length]
        largest = pad(largest, beyond).unflatten(axis, (count, size)).amax(axis + 1)
    largest = largest / LARGEST
    if powers:
        mantissa, exponent = torch.frexp(largest)
        largest = torch.ldexp((largest > 0).float(), exponent - (mantissa == 0.5).int())
    scale = largest.to(TORCH_DTYPES[of_scales.dtype]).reshape(of_scales.shape)
    scale = torch.where(scale > 0, scale, torch.ones_like(scale))
    values = matrix / spread(scale.float(), shape, packed)
    return values.clamp(-LARGEST, LARGEST).to(torch.float8_e4m3fn), scale


def _check(source: Checkpoint, layout: Checkpoint) -> None:
    """Raise CheckpointError unless the VLM is in FP8 with scales of weights alone, and has the same tensors."""
    if not layout.packed:
        raise CheckpointError(f"{layout.path}: keeps no matrix in FP8; give the FP8 VLM that was merged")
    if strange := set(source.tensors) ^ set(layout.tensors):
        raise CheckpointError(f"{source.path}: {min(strange)} is not in it and in {layout.path}; give the VLM it is of")
    for name, packed in layout.packed.items():
        kinds = {key: part.dtype for key, part in packed.parts.items()}
        if set(kinds) != {"values", "scale"} or kinds["values"] != "F8_E4M3" or kinds["scale"] not in SCALES:
            raise CheckpointError(
                f"{layout.path}: {name} is kept as {kinds}; only FP8 values (F8_E4M3) with a scale in "
                f"{', '.join(SCALES)} are written again"
            )
        if source.tensors[name].shape != packed.parts["values"].shape:
            raise CheckpointError(f"{source.path}: {name} has another shape than in {layout.path}; give its VLM")
    on_disk = {name for file in layout.files for name in read_header(file)}
    if activations := sorted(on_disk - set(layout.stored)):
        raise CheckpointError(
            f"{layout.path}: {activations[0]} was measured on the VLM's activations, which the merged model has not; "
            "quantise it with the tool that made this VLM"
        )


def _specs(source: Checkpoint, layout: Checkpoint, name: str) -> list[TensorSpec]:
    """The tensors that are written for a tensor: itself, or its FP8 values and their scales."""
    parts = [source.tensors[name]]
    if name in layout.packed:
        parts = [layout.packed[name].parts[key] for key in ("values", "scale")]
    return [TensorSpec(part.name, part.dtype, part.shape) for part in parts]
