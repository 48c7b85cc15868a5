"""How far the models moved: distances per layer and module, differences, bases; and the spectra of the task vector."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vlmgraft.report.charts import Dot, Heat, Lines, Series
from vlmgraft.report.collect import Run
from vlmgraft.report.sections import Figure, Section, Table
from vlmgraft.report.text import number, sentence

Row = Mapping[str, Any]


def distances(run: Run, inspection: Row) -> Section:
    """One file of distances, and the inspection from the same folder."""
    title = "How far donor and VLM have moved"
    text = [
        "τ is what the donor's tuning changed, τ_vlm what the VLM's did. DRIFT (arXiv 2510.15050) found merging "
        "harmless where τ was short beside the weights and not opposed to τ_vlm; no threshold is known that holds for "
        "every pair, so measure what a merge costs. Two unrelated matrices of one norm are 1.41 apart."
    ]
    layers = [row for row in run.rows if row["layer"] is not None]
    maps = (
        ("ratio", "Length of τ beside the weights, ‖τ‖ / ‖W‖", True),
        ("vlm_ratio", "Length of the VLM's own change, ‖τ_vlm‖ / ‖W‖", True),
        ("cosine", "Cosine between τ_vlm and τ", False),
    )
    figures = [_map(layers, *settings) for settings in maps] if layers else []
    keys = ("group", "weight_norm", "donor_norm", "ratio", "vlm_norm", "vlm_ratio", "cosine", "unchanged")
    table = Table(
        "distances",
        ("layer", "group", "‖W‖", "‖τ‖", "‖τ‖/‖W‖", "‖τ_vlm‖", "‖τ_vlm‖/‖W‖", "cosine", "zeros of τ"),
        [(row["layer"], *(row[key] for key in keys)) for row in run.rows],
    )
    tables = [table, *_more(inspection)]
    if inspection.get("base"):
        text.append(sentence(_names(inspection["base"], inspection.get("bases", []))))
    if inspection and not inspection.get("differences"):
        text.append("Heads, rotary settings, biases and vocabulary of all models agree.")
    return Section("distances", "distances", title, text, figures, tables)


def _names(text: str, bases: Sequence[Row]) -> str:
    """Shorten folders to their last part: our paths mean nothing to the reader."""
    for candidate in bases:
        text = text.replace(candidate["base"], Path(candidate["base"]).name)
    return text


def _map(rows: Sequence[Row], key: str, caption: str, one_sided: bool) -> Figure:
    values = {(row["group"], row["layer"]): row[key] for row in rows}
    reach = max([abs(value) for value in values.values()] + [1e-9])
    return Figure(caption, Heat.by_layer(values, reach=reach, one_sided=one_sided))


def _more(inspection: Row) -> list[Table]:
    rows = [
        (row["field"], row["other"], str(row["vlm"]), str(row["theirs"]), row["weight"], row["meaning"])
        for row in inspection.get("differences", [])
    ]
    bases = [(row["base"], row["donor_ratio"], row["vlm_ratio"]) for row in inspection.get("bases", [])]
    return [
        Table("differences", ("field", "checkpoint", "VLM", "theirs", "weight", "meaning"), rows),
        Table("candidates for the donor's base", ("base", "‖τ‖/‖W‖", "‖τ_vlm‖/‖W‖"), bases),
    ]


def spectra(run: Run) -> Section:
    """Singular values by layer, and the effective rank of the task vector."""
    keys = (("norm", "‖τ‖"), ("effective_rank", "effective rank"), ("stable_rank", "stable rank"))
    table = Table(
        "spectra",
        ("matrix", "layer", "group", *(name for _, name in keys), "directions", "first 1", "first 8", "first 64"),
        [
            [row["name"], row["layer"], row["group"], *(row[key] for key, _ in keys), min(row["shape"])]
            + [row["first"][count] for count in ("1", "8", "64")]
            for row in run.rows
        ],
    )
    rows = [row for row in run.rows if row["shown"]]
    if not rows:
        return Section("spectra", "spectra", "The donor's tuning changed none of these matrices", tables=[table])
    whole = math.hypot(*(row["norm"] for row in rows))
    eight = sum(row["first"]["8"] * (row["norm"] / whole) ** 2 for row in rows)
    how = "concentrated" if eight > 0.5 else "spread out"
    title = f"The donor's change is {how}: 8 directions per matrix hold {100 * eight:.0f} % of its energy"
    curves = [_curve(kind, rows) for kind in dict.fromkeys(_kind(row["name"]) for row in rows)]
    lines = Lines(curves, "direction, from the largest", "s / s of the first", log_y=True)
    figures = [Figure("Singular values of τ, mean over layers", lines, "relative to the first one of their matrix")]
    ranks = {(_kind(row["name"]), row["layer"]): row["effective_rank"] for row in rows if row["layer"] is not None}
    if ranks:
        settings: dict[str, Any] = {"unit": " directions", "written": "{:.1f}", "one_sided": True}
        heat = Heat.by_layer(ranks, reach=max(ranks.values()), **settings)
        figures.append(Figure("Effective rank of τ by layer", heat, "(Σ s²)² / Σ s⁴, in directions"))
    share = [row["effective_rank"] / min(row["shape"]) for row in rows]
    text = [
        f"An effective rank is {number(100 * min(share), 2)} to {number(100 * max(share), 2)} % of the directions a "
        "matrix has. Truncation keeps the first directions and drops the rest; FRISM weighs every direction by itself."
    ]
    return Section("spectra", "spectra", title, text, figures, [table])


def _kind(name: str) -> str:
    return name.removesuffix(".weight").rsplit(".", 1)[-1]


def _curve(kind: str, rows: Sequence[Row]) -> Series:
    """The mean over layers of the relative singular values; all matrices of one kind have the same indices."""
    shown = [row["shown"] for row in rows if _kind(row["name"]) == kind]
    count = min(map(len, shown))
    dots = []
    for index in range(0, count, max(1, count // 12)):
        direction = shown[0][index][0] + 1
        mean = sum(values[index][1] / values[0][1] for values in shown) / len(shown)
        dots.append(Dot(direction, mean, f"{kind}, direction {direction}: {number(mean)} of the first"))
    return Series(kind, tuple(dots), {"matrix": kind})
