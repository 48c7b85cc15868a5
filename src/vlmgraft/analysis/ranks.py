"""Which singular directions carry what: one band of them at a time, over λ (FRISM, arXiv 2601.21187, figure 3).

    W = W_vlm + λ Σ_{i in band} s_i u_i v_iᵀ

in every merged matrix at once. A band holds the same share of every matrix's directions, or of its energy Σ s².
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from vlmgraft.analysis.log import CellLog, Progress
from vlmgraft.analysis.merged import Rebuilder
from vlmgraft.analysis.scores import Exam, summarise
from vlmgraft.analysis.swap import swapped, text_parameters
from vlmgraft.errors import RecipeError

By = Literal["rank", "energy"]
KEYS = ("by", "of", "band", "scale")
DEFAULT_SCALES = (0.5, 1.0, 2.0, 3.0, 4.0, 6.0)


def band_of(s: Float[Tensor, " r"], band: int, of: int, by: By = "rank") -> slice:
    """Directions of band number `band` (from 0, the largest singular values first) of `of` bands.

    by rank: cut at round(r · k / of). by energy: cut where the running Σ s² first reaches k / of of the whole. Bands
    do not overlap and together hold all directions; with few directions some hold none.
    """
    if by == "rank":
        return slice(round(len(s) * band / of), round(len(s) * (band + 1) / of))
    running = s.double().square().cumsum(0)
    cuts = torch.searchsorted(running, running[-1] * torch.arange(1, of, dtype=torch.float64) / of) + 1
    edges = [0, *cuts.tolist(), len(s)]
    return slice(min(edges[band], len(s)), min(edges[band + 1], len(s)))


def rank_cells(of: int, scales: Sequence[float], by: By) -> list[dict[str, Any]]:
    """The VLM itself (band None, λ 0), all directions (band None) and every band, over λ."""
    if of < 1:
        raise RecipeError(f"bands: {of} must be at least 1")
    if by not in ("rank", "energy"):
        raise RecipeError(f'by: {by!r} is neither "rank" nor "energy"')
    bands: list[int | None] = [None, *range(of)]
    cells = [{"by": by, "of": of, "band": band, "scale": float(scale)} for band in bands for scale in scales if scale]
    return [{"by": by, "of": of, "band": None, "scale": 0.0}, *cells]


def measure_ranks(
    model: Any,
    exam: Exam,
    rebuilder: Rebuilder,
    folder: str | Path,
    settings: Mapping[str, Any],
    *,
    bands: int = 4,
    scales: Sequence[float] = DEFAULT_SCALES,
    by: By = "rank",
    drift: Callable[[Any], float] | None = None,
    resume: bool = False,
    progress: Progress | None = None,
) -> list[dict[str, Any]]:
    """Measure every band at every λ into `folder/ranks.jsonl`, and give the rows.

    A row has the accuracies, `energy`, the share of Σ‖τ‖² in its band (1 for all directions), and `injected`, λ times
    the norm of the band over the norm of τ: the length of the step that was taken. drift: KL of the model as it is now.
    """
    factors = rebuilder.factors or {}
    parameters = text_parameters(model)
    log = CellLog(folder, "ranks", KEYS, {**settings, "exam": exam.label}, resume=resume)
    total = sum(float(one.s.double().square().sum()) for one in factors.values())

    def measure(cell: Mapping[str, Any]) -> dict[str, Any]:
        spectra = {name: _band_only(one.s, cell) for name, one in factors.items()}
        energy = sum(float(one.double().square().sum()) for one in spectra.values()) / total
        weights = rebuilder.with_spectra({name: cell["scale"] * one for name, one in spectra.items()})
        with swapped(parameters, weights):
            scores = asdict(summarise(exam(model), exam))
            kl = drift(model) if drift is not None else None
        return {**scores, "kl": kl, "energy": energy, "injected": cell["scale"] * energy**0.5}

    return list(log.measure(rank_cells(bands, scales, by), measure, progress))


def _band_only(s: Float[Tensor, "*experts r"], cell: Mapping[str, Any]) -> Tensor:
    """The spectrum with zeros outside the band; of fused experts each has its own band."""
    if cell["band"] is None:
        return s
    if s.ndim > 1:
        return torch.stack([_band_only(one, cell) for one in s])
    kept = torch.zeros_like(s)
    inside = band_of(s, cell["band"], cell["of"], cell["by"])
    kept[inside] = s[inside]
    return kept


def peaks(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """For all directions (band None) and every band, the λ with the best reasoning, and what it was there."""
    best = []
    for band in dict.fromkeys(row["band"] for row in rows if row["scale"]):
        own = [row for row in rows if row["band"] == band and row["scale"]]
        top = max(own, key=lambda row: row["reasoning"]["mean"])
        best.append({key: top[key] for key in ("band", "of", "scale", "energy", "injected", "reasoning", "perception")})
    return best
