"""What a merge's costs are reckoned for: published GPUs, and this machine's cores at a rate that is measured now."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from typing import Any

from vlmgraft.storage.resources import free_memory, usable_cores


@dataclass(frozen=True)
class Device:
    """Published peaks: bf16 and double precision (tensor cores, dense) in operations per second; memory, its bytes and
    bytes per second; link, bytes per second from the host's memory (PCIe 4 and 5, 16 lanes). Assumed: the shares of
    them that training and reading (`products`), writing answers a token at a time (`stream`), decompositions (`eigen`:
    eigenvectors are no matrix products) and offloaded layers (`copies`) get. width: bytes per weight."""

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
    """The device that a torch device is reckoned as: a GPU as an A100 or H100, whichever its compute capability is
    nearer to, with its own memory; anything else as this machine's cores, at the rates of one product in `dtype`
    (float32) and in double precision, measured now."""
    import torch

    if device is not None and device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        nearest = H100 if properties.major >= 9 else A100
        return replace(nearest, name=f"{properties.name}, as {nearest.name}", memory=float(properties.total_memory))
    cores = usable_cores()
    dtype, memory = dtype or torch.float32, float(free_memory())
    # of the rate of one product: gates of a 135 M model took 0.7, its answers reckoned as short as they were; the route
    # by the Gram matrix takes 0.67, the one of a small rank 0.06 to 0.12
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
