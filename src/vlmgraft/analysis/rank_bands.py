"""What singular directions carry: one band of them at a time, over λ (FRISM, arXiv 2601.21187, figure 3).

    W = W_vlm + λ Σ_{i in band} s_i u_i v_iᵀ

in every merged matrix at once. A band holds the same share of every matrix's directions, or of its energy Σ s².
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from vlmgraft.analysis.bench import REMEDY, Bench, load_bench
from vlmgraft.analysis.eval_data import EvalData
from vlmgraft.analysis.in_memory import Rebuilder, swapped
from vlmgraft.errors import RecipeError
from vlmgraft.recipe.resolve import RecipeSource, pair, read_recipe
from vlmgraft.spectral.decompose import decompose
from vlmgraft.storage.files import make_folder
from vlmgraft.storage.locks import at_work
from vlmgraft.storage.progress import Progress

By = Literal["rank", "energy"]
KEYS = ("by", "of", "band", "scale")
DEFAULT_SCALES = (0.5, 1.0, 2.0, 3.0, 4.0, 6.0)


def ranks(
    recipe: RecipeSource,
    out: str | Path,
    data: EvalData | None = None,
    *,
    overrides: Sequence[str] = (),
    bands: int = 4,
    scales: Sequence[float] = DEFAULT_SCALES,
    by: By = "rank",
    resume: bool = False,
    progress: Progress | None = None,
) -> list[dict[str, Any]]:
    """Inject one band of directions at a time over λ; rows in `out`/ranks.jsonl. The recipe's method is not used.

    The factors are kept in `out`/factors. Raises the errors of `pipeline.decompose`, DataError and OutputError.
    """
    data, out = data or EvalData(), Path(out)
    rank_cells(bands, scales, by)
    loaded = read_recipe(recipe, overrides, need_method=False)
    alignment = pair(loaded)
    with at_work(out, "measuring bands", REMEDY, [loaded.vlm, loaded.donor], ["ranks.*", "factors"]):
        make_folder(out)
        store = decompose(alignment, out / "factors", resume=True, progress=progress)
        settings = {"vlm": loaded.vlm, "donor": loaded.donor, "donor_base": loaded.donor_base, "factors": store.digest}
        models = [checkpoint.path for checkpoint in alignment.opened.values()]
        more: dict[str, Any] = {"settings": settings, "models": models, "resume": resume, "progress": progress}
        bench = load_bench(alignment.vlm.path, data, out, **more)
        with Rebuilder(alignment, dict(store)) as rebuilder:
            return measure_ranks(bench, rebuilder, rank_cells(bands, scales, by))


def band_of(s: Float[Tensor, " r"], band: int, of: int, by: By = "rank") -> slice:
    """Directions of band number `band` (from 0, the largest singular values first) of `of` bands.

    by rank: cut at round(r · k / of). by energy: cut where the cumulative Σ s² first reaches k / of times the total.
    Bands do not overlap and together hold all directions; with few directions some are empty.
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


def measure_ranks(bench: Bench, rebuilder: Rebuilder, cells: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Measure every band at every λ, write ranks.jsonl and return the rows.

    A row has the accuracies, `energy`, the share of Σ‖τ‖² in its band (1 for all directions), and `injected`, λ times
    the norm of the band over the norm of τ: the relative length of the update.
    """
    factors = rebuilder.factors or {}
    total = sum(float(matrix.s.double().square().sum()) for matrix in factors.values())

    def measure(cell: Mapping[str, Any]) -> dict[str, Any]:
        spectra = {name: _band_only(matrix.s, cell) for name, matrix in factors.items()}
        energy = sum(float(spectrum.double().square().sum()) for spectrum in spectra.values()) / total
        weights = rebuilder.with_spectra({name: cell["scale"] * spectrum for name, spectrum in spectra.items()})
        with swapped(bench.parameters, weights):
            return {**bench.ask(), "energy": energy, "injected": cell["scale"] * energy**0.5}

    return list(bench.measure("ranks", KEYS, cells, measure))


def _band_only(s: Float[Tensor, "*experts r"], cell: Mapping[str, Any]) -> Tensor:
    """The spectrum with zeros outside the band; each of the fused experts is cut by itself."""
    if cell["band"] is None:
        return s
    if s.ndim > 1:
        return torch.stack([_band_only(spectrum, cell) for spectrum in s])
    kept = torch.zeros_like(s)
    inside = band_of(s, cell["band"], cell["of"], cell["by"])
    kept[inside] = s[inside]
    return kept


def peaks(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """For all directions (band None) and every band, the λ with the best reasoning, and the results at that λ."""
    best = []
    for band in dict.fromkeys(row["band"] for row in rows if row["scale"]):
        of_band = [row for row in rows if row["band"] == band and row["scale"]]
        top = max(of_band, key=lambda row: row["reasoning"]["mean"])
        best.append({key: top[key] for key in ("band", "of", "scale", "energy", "injected", "reasoning", "perception")})
    return best
