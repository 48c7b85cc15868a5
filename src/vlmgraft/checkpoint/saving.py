"""Small sets of tensors as one safetensors file: whole under its name or absent, and on disk when it appears.

The library's own `save_file` writes beside its target under a name that we do not know, with no flush; here the name
is ours, so that what a kill leaves can be found. Nothing is copied, and equal tensors give equal bytes: the header's
keys are in order, which those of the library are not.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from vlmgraft.checkpoint.reader import TORCH_DTYPES, as_bytes
from vlmgraft.checkpoint.shards import TensorSpec, header_of
from vlmgraft.durable import new_file

CODES = {dtype: code for code, dtype in TORCH_DTYPES.items()}


def save_tensors(tensors: Mapping[str, Tensor], path: Path, metadata: Mapping[str, str] | None = None) -> None:
    """Write `path`. tensors: contiguous, on the CPU. metadata: strings for the header. Raises OSError."""
    order = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))  # every tensor aligned
    specs = [TensorSpec(name, CODES[tensors[name].dtype], tuple(tensors[name].shape)) for name in order]
    with new_file(path) as file:
        file.write(header_of(specs, dict(sorted((metadata or {}).items()))))
        for name in order:
            if tensors[name].numel():
                file.write(as_bytes(tensors[name]))
