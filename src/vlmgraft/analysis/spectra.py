"""Spectra of the donor's task vector: its effective rank, and the energy in its first directions.

Per matrix, with s the singular values of τ:

    first[k]        Σ_{i≤k} s² / Σ s²                share of the energy in the first k directions
    effective_rank  (Σ s²)² / Σ s⁴                   participation ratio: k for k equal singular values
    stable_rank     Σ s² / s₁²

Small matrices are decomposed in full. For large ones the first directions come from block Krylov iteration, Σ s² from
the entries, and the rest of Σ s⁴ from random probes: E‖RᵀR z‖² = ‖RᵀR‖_F² for the residual R and Gaussian z
(Hutchinson); the large values are removed first, as in Hutch++ (arXiv 2010.09649). `exact`: decomposed in full.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from vlmgraft.alignment import Alignment
from vlmgraft.spectral.svd import decompose_matrix
from vlmgraft.spectral.task_vector import TaskVectors

FIRST = (1, 8, 64)
SMALL = 1024
"""Matrices with a short side up to this are decomposed in full: a second or two each."""
DIRECTIONS = 64
PROBES = 16


@dataclass(frozen=True)
class Spectrum:
    """The spectrum of one matrix. shown: (index, singular value) of at most 64 values, evenly spread over the known
    ones, largest first. first: share of energy by number of directions. norm: ‖τ‖."""

    name: str
    layer: int | None
    group: str
    shape: tuple[int, int]
    norm: float
    effective_rank: float
    stable_rank: float
    first: dict[int, float]
    shown: tuple[tuple[int, float], ...]
    exact: bool


def measure_spectra(
    alignment: Alignment, progress: Callable[[int, int, str], None] | None = None
) -> Iterator[Spectrum]:
    """One spectrum per merged matrix, one matrix in memory at a time; stacks and vectors are left out.

    Raises:
        AlignmentError: no donor_base. NumericalError: a tensor is not finite.
    """
    matrices = tuple(tensor for tensor in alignment.merged if len(alignment.vlm.tensors[tensor.name].shape) == 2)
    kept = {matrix.name for matrix in matrices}
    tensors = tuple(
        tensor if tensor.verdict != "merged" or tensor.name in kept else tensor._replace(verdict="excluded")
        for tensor in alignment.tensors
    )
    with TaskVectors(replace(alignment, tensors=tensors)) as taus:
        for done, matrix in enumerate(matrices):
            if progress is not None:
                progress(done, len(matrices), matrix.name)
            yield spectrum_of(taus.load(matrix.name), matrix.name, matrix.layer, matrix.group)


def spectrum_of(
    tau: Float[Tensor, "out in"], name: str, layer: int | None = None, group: str = "other", small: int = SMALL
) -> Spectrum:
    """The spectrum of one matrix; `small` is the short side up to which it is decomposed in full."""
    exact = min(tau.shape) <= small
    svd = decompose_matrix(tau, "full" if exact else min(DIRECTIONS, min(tau.shape)), name=name)
    s, energy = svd.s.double(), svd.energy
    shape = (tau.shape[0], tau.shape[1])
    if energy == 0:
        return Spectrum(name, layer, group, shape, 0.0, 0.0, 0.0, dict.fromkeys(FIRST, 0.0), (), exact)
    fourth = float(s.pow(4).sum())
    if not exact:
        fourth += _fourth_of_rest(tau.float() - (svd.U * svd.s) @ svd.Vh)
    first = {k: min(1.0, float(s[:k].square().sum()) / energy) for k in FIRST}
    picked = torch.linspace(0, len(s) - 1, min(DIRECTIONS, len(s))).round().long().unique().tolist()
    shown = tuple((index, float(s[index])) for index in picked)
    stable = energy / float(s[0].square())
    return Spectrum(name, layer, group, shape, energy**0.5, energy**2 / fourth, stable, first, shown, exact)


def _fourth_of_rest(rest: Float[Tensor, "out in"]) -> float:
    """Σ s⁴ of a matrix, estimated from random probes that are the same for the same shape."""
    generator = torch.Generator().manual_seed(0)
    probes = torch.randn(rest.shape[1], PROBES, generator=generator).to(rest)
    return float((rest.mT @ (rest @ probes)).double().square().sum()) / PROBES
