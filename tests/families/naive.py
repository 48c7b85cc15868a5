"""Methods written out over whole tensors in memory: the naive twins that every family's merge is compared with.

Each takes the models as {VLM's name on disk: float32 tensor} over the merged tensors, and gives the merged ones. They
share no code with `vlmgraft.methods`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Models:
    """The four models over the merged tensors, and the decoder layer of each tensor."""

    vlm: Tensors
    donor: Tensors
    donor_base: Tensors
    vlm_base: Tensors
    layers: Mapping[str, int | None]

    @property
    def tau(self) -> Tensors:
        return {name: self.donor[name] - self.donor_base[name] for name in self.vlm}

    @property
    def tau_vlm(self) -> Tensors:
        return {name: self.vlm[name] - self.vlm_base[name] for name in self.vlm}


@dataclass(frozen=True)
class Row:
    """One method's row of the matrix: options of its recipe and its naive twin."""

    twin: Callable[[Models], Tensors]
    options: Mapping[str, Any] = field(default_factory=dict)
    modules: tuple[str, ...] = ("attention", "mlp")
    matrices_only: bool = False


def linear(models: Models, keep: int = -1) -> Tensors:
    """a V + (1 − a) D with a = 0.9; layers up to `keep` stay the VLM's."""
    mixed = {name: 0.9 * vlm + 0.1 * models.donor[name] for name, vlm in models.vlm.items()}
    return {name: models.vlm[name] if (models.layers[name] or 0) <= keep else one for name, one in mixed.items()}


def task_arithmetic(models: Models) -> Tensors:
    """V + 0.5 τ."""
    return {name: vlm + 0.5 * models.tau[name] for name, vlm in models.vlm.items()}


def trim(tau: Tensors, density: float) -> Tensors:
    """Keep the largest magnitudes of all tensors together, at least the share `density`, whole at the threshold."""
    every = torch.cat([one.abs().flatten() for one in tau.values()])
    threshold = every.sort(descending=True).values[round(density * len(every)) - 1]
    return {name: torch.where(one.abs() >= threshold, one, 0.0) for name, one in tau.items()}


def ties(models: Models, density: float = 0.5) -> Tensors:
    """Global trim, sign of the unweighted sum, mean of those that agree."""
    own, theirs = trim(models.tau_vlm, density), trim(models.tau, density)
    merged = {}
    for name, base in models.vlm_base.items():
        pair = torch.stack([own[name], theirs[name]])
        agree = (pair.sign() == pair.sum(0).sign()) & (pair != 0)
        merged[name] = base + (pair * agree).sum(0) / agree.sum(0).clamp(min=1)
    return merged


def both(models: Models) -> Tensors:
    """W_vlm_base + τ_vlm + 0.5 τ: what DARE gives at density one."""
    return {n: base + models.tau_vlm[n] + 0.5 * models.tau[n] for n, base in models.vlm_base.items()}


def truncated(models: Models) -> Tensors:
    """V + the two largest singular directions of τ."""
    merged = {}
    for name, vlm in models.vlm.items():
        U, s, Vh = torch.linalg.svd(models.tau[name].double(), full_matrices=False)
        merged[name] = vlm + ((U[:, :2] * s[:2]) @ Vh[:2]).float()
    return merged


ROWS: dict[str, Row] = {
    "linear": Row(linear, {"vlm_weight": 0.9}),
    "task_arithmetic": Row(task_arithmetic, {"scale": 0.5}, ("all", "embeddings", "head")),
    "layer_swap": Row(lambda models: linear(models, keep=0), {"vlm_weight": 0.9, "keep_layers": "0"}),
    "ties": Row(ties, {"density": 0.5}),
    "dare_linear": Row(both, {"density": 1.0, "weights": [1.0, 0.5]}),
    "dare_ties": Row(lambda models: ties(models, 1.0), {"density": 1.0}),
    "spectral": Row(truncated, {"rule": "truncate", "rank": 2}, matrices_only=True),
}
"""One row per registered method that needs no learning. DARE is compared at density one: which entries it drops is a
matter of its own tests, that it finds its tensors is a matter of these."""

LEARNED = ("frism", "curvature")
"""Methods whose gates are learned first; their fold is tested in tests/methods."""
