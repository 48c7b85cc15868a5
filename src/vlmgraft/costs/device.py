"""Devices of the cost model: GPUs at published rates, and this machine's cores at rates measured at run time."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from typing import Any

from vlmgraft.storage.resources import free_memory, usable_cores


@dataclass(frozen=True)
class Device:
    """Published peaks: bf16 and double, operations per second of the tensor cores, dense; memory in bytes, bandwidth in
    bytes per second; link, bytes per second from host memory (PCIe 4 and 5, 16 lanes). Assumed shares of these peaks:
    products for training and prompts, stream for decoding a token at a time, eigen for decompositions (eigenvectors are
    not matrix products), copies for offloaded layers. width: bytes per weight."""

    name: str
    bf16: float
    double: float
    bandwidth: float
    memory: float
    products: float = 0.4
    stream: float = 0.6
    eigen: float = 0.03
    link: float = 32e9
    copies: float = 0.75
    is_gpu: bool = True
    width: int = 2


A100 = Device("A100 80 GB", 312e12, 19.5e12, 2.039e12, 80e9)
H100 = Device("H100 SXM 80 GB", 989e12, 67e12, 3.35e12, 80e9, link=64e9)


def device_of(device: Any = None, dtype: Any = None) -> Device:
    """The cost model's device for a torch device: a GPU counts as an A100 or H100, whichever is nearer in compute
    capability, with its own memory; anything else as this machine's cores, at the rates of one matrix product in
    `dtype` (float32) and in double precision, measured now."""
    import torch

    if device is not None and device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        nearest = H100 if properties.major >= 9 else A100
        return replace(nearest, name=f"{properties.name}, as {nearest.name}", memory=float(properties.total_memory))
    cores = usable_cores()
    dtype, memory = dtype or torch.float32, float(free_memory())
    # shares of the rate of one product: gates of a 135 M model took 0.7 (with their actual answer lengths); the
    # decomposition by the Gram matrix takes 0.67, that to a small rank 0.06 to 0.12
    options: dict[str, Any] = {"products": 0.7, "eigen": 0.2, "is_gpu": False, "width": dtype.itemsize}
    return Device(f"CPU, {cores} cores", product_rate(dtype), product_rate(torch.float64), 20e9, memory, **options)


def product_rate(dtype: Any) -> float:
    """Operations per second of a product of 512 × 1,024 by 1,024 × 1,024 on this machine's cores: the best of eight."""
    import torch

    left, right = torch.ones(512, 1024, dtype=dtype), torch.ones(1024, 1024, dtype=dtype)
    seconds = []
    for _ in range(8):
        began = time.perf_counter()
        left @ right.mT
        seconds.append(time.perf_counter() - began)
    return 2 * 512 * 1024**2 / min(seconds)
