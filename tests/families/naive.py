"""Methods written out over whole tensors in memory: the naive twins that every family's merge is compared with.

Each takes the models as {VLM's name on disk: float32 tensor} over the merged tensors, and gives the merged ones. They
share no code with `vlmgraft.methods`.
"""

from __future__ import annotations

import math
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
    """One method's row of the matrix: its naive twin, options of its recipe, the tensors it can merge.

    gates: of a method that learns gates first, the logit that all of them have here.
    """

    twin: Callable[[Models], Tensors]
    options: Mapping[str, Any] = field(default_factory=dict)
    modules: tuple[str, ...] = ("all", "embeddings", "head")
    gates: float | None = None


def linear(models: Models, keep: int = -1) -> Tensors:
    """a V + (1 − a) D with a = 0.9; layers up to `keep` stay the VLM's."""
    mixed = {name: 0.9 * vlm + 0.1 * models.donor[name] for name, vlm in models.vlm.items()}
    kept = {name for name, layer in models.layers.items() if layer is not None and layer <= keep}
    return {name: models.vlm[name] if name in kept else one for name, one in mixed.items()}


def task_arithmetic(models: Models, scale: float = 0.5) -> Tensors:
    """V + λ τ."""
    return {name: vlm + scale * models.tau[name] for name, vlm in models.vlm.items()}


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


def ip_merging(models: Models, threshold: float = 0.1, k: int = 4) -> Tensors:
    """V + τ_k·Σs/Σs' Σ p_i² v_i v_iᵀ, p = softmax(32 c), where some c_i ≥ T; a matrix per expert."""
    merged = {name: vlm.clone() for name, vlm in models.vlm.items()}
    for name, own in models.tau_vlm.items():
        targets = merged[name].view(-1, *own.shape[-2:])
        for target, a, b in zip(targets, own.view(targets.shape), models.tau[name].view(targets.shape), strict=True):
            U, s, Vh = (part.double() for part in torch.linalg.svd(a.double(), full_matrices=False))
            donor_U, donor_s, donor_Vh = torch.linalg.svd(b.double(), full_matrices=False)
            cosines = torch.stack([(Vh[i] @ donor_Vh[i]) * (U[:, i] @ donor_U[:, i]).sign() for i in range(k)])
            if cosines.max() >= threshold:
                weighted = (32 * cosines).softmax(0)[:, None] * Vh[:k]
                low_rank = donor_U[:, :k] @ torch.diag(donor_s[:k]) @ donor_Vh[:k]
                target += (s[:k].sum() / donor_s[:k].sum() * low_rank @ weighted.T @ weighted).float()
    return merged


def frank(models: Models) -> Tensors:
    """B + λ_V τ_vlm + λ_R τ with λ_t ∝ w_t ‖τ_t‖² per layer; w_V is one in layer 0, e^-½ in layer 1, ½ outside."""
    merged = {}
    for layer in set(models.layers.values()):
        names = [name for name, one in models.layers.items() if one == layer]
        visual = 0.5 if layer is None else math.exp(-0.5 * layer)
        own, donor = (
            weight * sum(float(tau[name].double().square().sum()) for name in names)
            for weight, tau in ((visual, models.tau_vlm), (1 - visual, models.tau))
        )
        for name in names:
            update = own * models.tau_vlm[name] + donor * models.tau[name]
            merged[name] = models.vlm_base[name] + update / (own + donor)
    return merged


def truncated(models: Models) -> Tensors:
    """V + the two largest singular directions of τ; a matrix per expert."""
    merged = {}
    for name, vlm in models.vlm.items():
        U, s, Vh = torch.linalg.svd(models.tau[name].double(), full_matrices=False)
        merged[name] = vlm + ((U[..., :2] * s[..., None, :2]) @ Vh[..., :2, :]).float()
    return merged


def per_matrix(models: Models, rule: Callable[..., torch.Tensor]) -> Tensors:
    """B + rule(τ_vlm, τ) in float64, a matrix per expert."""
    merged = {}
    for name, base in models.vlm_base.items():
        stacks = [(t if t.ndim == 3 else t[None]).double() for t in (models.tau_vlm[name], models.tau[name])]
        update = torch.stack([rule(vlm, donor) for vlm, donor in zip(*stacks, strict=True)])
        merged[name] = (base.double() + update.reshape(base.shape)).float()
    return merged


def sce(vlm: torch.Tensor, donor: torch.Tensor) -> torch.Tensor:
    """Mean of those that agree, weighted by their energy in the matrix."""
    taus = torch.stack([vlm, donor])
    weights = torch.stack([vlm.square().sum(), donor.square().sum()]).reshape(2, *[1] * vlm.ndim)
    agree = (taus.sign() == taus.sum(0).sign()) * weights
    return (taus * agree).sum(0) / agree.sum(0).clamp(min=1e-30)


def model_stock(vlm: torch.Tensor, donor: torch.Tensor) -> torch.Tensor:
    """t (τ_vlm + τ)/2 with t = 2c/(1 + c)."""
    norms = vlm.norm() * donor.norm()
    c = float((vlm * donor).sum() / norms) if norms > 0 else 0.0
    return c / (1 + c) * (vlm + donor)


def slerp(models: Models, t: float = 0.3) -> Tensors:
    """Along the great circle from V to D, a matrix per expert; the mean where they are nearly collinear."""
    merged = {}
    for name, vlm in models.vlm.items():
        parts = []
        for a, b in zip(
            *((one if one.ndim == 3 else one[None]).double() for one in (vlm, models.donor[name])), strict=True
        ):
            angle = torch.acos(((a * b).sum() / a.norm() / b.norm()).clamp(-1, 1))
            mean = (1 - t) * a + t * b
            arc = (torch.sin((1 - t) * angle) * a + torch.sin(t * angle) * b) / torch.sin(angle)
            parts.append(mean if not abs(torch.cos(angle)) <= 0.9995 else arc)
        merged[name] = torch.stack(parts).reshape(vlm.shape).float()
    return merged


MATRICES = ("attention", "mlp")
ROWS: dict[str, Row] = {
    "linear": Row(linear, {"vlm_weight": 0.9}),
    "task_arithmetic": Row(task_arithmetic, {"scale": 0.5}),
    "layer_swap": Row(lambda models: linear(models, keep=0), {"vlm_weight": 0.9, "keep_layers": "0"}),
    "ties": Row(ties, {"density": 0.5}),
    "dare_linear": Row(both, {"density": 1.0, "weights": [1.0, 0.5]}),
    "dare_ties": Row(lambda models: ties(models, 1.0), {"density": 1.0}),
    "della": Row(lambda models: ties(models, 1.0), {"density": 1.0}),
    "breadcrumbs": Row(both, {"density": 1.0, "weights": [1.0, 0.5]}),
    "sce": Row(lambda models: per_matrix(models, sce)),
    "model_stock": Row(lambda models: per_matrix(models, model_stock)),
    "slerp": Row(slerp, {"t": 0.3}),
    "ip_merging": Row(ip_merging, {"threshold": 0.1, "rank": 4}, MATRICES),
    "frank": Row(frank, {"decay": 0.5}),
    "spectral": Row(truncated, {"rule": "truncate", "rank": 2}, MATRICES),
    "frism": Row(lambda models: task_arithmetic(models, 0.25), {"scale": 0.5}, MATRICES, gates=0.0),
    "curvature": Row(task_arithmetic, {"scale": 0.5}, MATRICES, gates=math.inf),
}
"""One row per registered method. DARE, DELLA and breadcrumbs are compared at density one: which entries they drop is a
matter of their own tests, that they find their tensors is a matter of these. FRISM and curvature gates have gates that
nobody learned: all half open, and all open."""
