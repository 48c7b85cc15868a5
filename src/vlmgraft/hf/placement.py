"""Where models are loaded and in which dtype: the first GPU in bfloat16, or the CPU in float32.

`VLMGRAFT_DEVICE` and `VLMGRAFT_DTYPE`, set by `--device` and `--dtype`, override this; a process started by `torchrun`
uses the GPU of its local rank. On CPUs, the number of threads follows from the model's size.
"""

from __future__ import annotations

import os
from contextlib import AbstractContextManager
from typing import Any

import torch

from vlmgraft.errors import InputError
from vlmgraft.spectral.threads import threads_for
from vlmgraft.storage.torchrun import whole_number

LARGE = 50_000_000
"""Number of parameters from which on matrix products dominate a step's time: below, bfloat16 saves nothing."""
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def default_device() -> torch.device:
    """The requested device, else this process's GPU, else the CPU.

    Raises:
        InputError: the requested device cannot be used.
    """
    name = os.environ.get("VLMGRAFT_DEVICE", "")
    if not name:
        available = torch.cuda.is_available()
        return torch.device("cuda", whole_number("LOCAL_RANK", 0)) if available else torch.device("cpu")
    try:
        device = torch.device(name)
        if device.type == "cuda" and device.index is None:
            device = torch.device("cuda", whole_number("LOCAL_RANK", 0))
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"--device {name}: cannot be used ({str(error)[:120]}); write cpu, or another") from None
    return device


def default_dtype(device: torch.device) -> torch.dtype:
    """The requested dtype, else bfloat16 on a GPU and float32 on the CPU.

    Raises:
        InputError: there is no such dtype.
    """
    name = os.environ.get("VLMGRAFT_DTYPE", "")
    if not name:
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    if name not in DTYPES:
        raise InputError(f"--dtype {name}: write one of {', '.join(DTYPES)}")
    return DTYPES[name]


def learning_dtype(device: torch.device, parameters: int, stored: set[str]) -> torch.dtype:
    """The dtype of models on which gates are learned (gates and losses are float32): `default_dtype`, but bfloat16 on a
    processor with AMX, three to four times as fast, for a VLM of at least `LARGE` parameters stored in bfloat16 alone.
    AVX512-BF16 is not enough: a core of an Intel Xeon (model 207, 2.3 GHz) multiplied matrices at 83 GFLOPS with it,
    and at 140 in float32. stored: dtypes as safetensors names them.
    """
    native = torch.cpu._is_amx_tile_supported()
    chosen = device.type != "cpu" or os.environ.get("VLMGRAFT_DTYPE")
    if chosen or parameters < LARGE or not stored <= {"BF16"} or not native:
        return default_dtype(device)
    return torch.bfloat16


def threads_of(model: Any) -> AbstractContextManager[None]:
    """`threads_for` the number of parameters of a model that answers, is compared or is trained inside the context."""
    return threads_for(sum(parameter.numel() for parameter in model.parameters()))
