"""Matrices as task vectors can be."""

from __future__ import annotations

import torch


def random_matrix(rows: int, columns: int, kind: str, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    plain = torch.randn(rows, columns, generator=generator)
    if kind == "noise":
        return plain
    if kind == "zero":
        return torch.zeros(rows, columns)
    if kind == "deficient":
        k = max(1, min(rows, columns) // 3)
        return torch.randn(rows, k, generator=generator) @ torch.randn(k, columns, generator=generator)
    Q, _, Ph = torch.linalg.svd(plain, full_matrices=False)
    if kind == "repeated":
        return 0.3 * Q @ Ph
    spectrum = 10.0 ** -torch.linspace(0, 6, min(rows, columns))  # "graded"
    return (Q * spectrum) @ Ph
