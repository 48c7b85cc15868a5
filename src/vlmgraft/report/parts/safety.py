"""Is merging safe: distances per layer and module, differences, bases; and the spectra of the task vector."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vlmgraft.report.charts import Axes, Dot, Heat, Series, heat_map, legend, line_chart
from vlmgraft.report.collect import Collected, Run
from vlmgraft.report.sections import Figure, Section, Table, topic
from vlmgraft.report.svg import number, sentence

Row = Mapping[str, Any]
LEVELS = {
    "safe": "Merging looks safe",
    "risky": "Merging is risky here, but not hopeless",
    "hopeless": "Merging is hopeless here",
}


def safety(found: Collected) -> list[Section]:
    """One section per file of distances, with the inspection that lies beside it."""
    beside = dict(found.inspections)
    return [_section(run, beside.get(run.folder), place) for place, run in enumerate(found.distances)]


def _section(run: Run, inspection: dict[str, Any] | None, place: int) -> Section:
    verdict = (inspection or {}).get("verdict")
    title = LEVELS[verdict["level"]] if verdict else "How far donor and VLM have moved"
    text = [sentence(verdict["reason"])] if verdict else []
    text.append(
        "τ is what the donor's tuning changed, τ_vlm what the VLM's did. A task vector that is short beside the "
        "weights, and not opposed to the VLM's own, can be added without harm (DRIFT, arXiv 2510.15050). Called safe: "
        "ratio up to 0.1 and cosine from −0.1 everywhere; hopeless: over 0.7 in the median."
    )
    figures = [
        _map(run.rows, "ratio", "Length of τ beside the weights, ‖τ‖ / ‖W‖", 0.0, True),
        _map(run.rows, "vlm_ratio", "Length of the VLM's own change, ‖τ_vlm‖ / ‖W‖", 0.0, True),
        _map(run.rows, "cosine", "Cosine between τ_vlm and τ", 0.0, False),
    ]
    keys = ("group", "weight_norm", "donor_norm", "ratio", "vlm_norm", "vlm_ratio", "cosine", "unchanged")
    table = Table(
        "distances",
        ("layer", "group", "‖W‖", "‖τ‖", "‖τ‖/‖W‖", "‖τ_vlm‖", "‖τ_vlm‖/‖W‖", "cosine", "zeros of τ"),
        [(row["layer"], *(row[key] for key in keys)) for row in run.rows],
    )
    tables = [table, *_more(inspection or {})]
    name = f"safety-{place}" if place else "safety"
    if inspection and inspection.get("base"):
        text.append(sentence(_names(inspection["base"], inspection.get("bases", []))))
    if inspection is not None and not inspection.get("differences"):
        text.append("Heads, rotary settings, biases and vocabulary of all models agree.")
    return Section(name, topic("is merging safe", run, place), title, text, figures, tables)


def _names(text: str, bases: Sequence[Row]) -> str:
    """Folders by their last part: the reader does not know our paths."""
    for one in bases:
        text = text.replace(one["base"], Path(one["base"]).name)
    return text


def _map(rows: Sequence[Row], key: str, caption: str, middle: float, one_sided: bool) -> Figure:
    layers = sorted({row["layer"] for row in rows if row["layer"] is not None})
    groups = list(dict.fromkeys(row["group"] for row in rows if row["layer"] is not None))
    values = {(row["group"], row["layer"]): row[key] for row in rows}
    reach = max([abs(value - middle) for place, value in values.items() if place[1] is not None] + [1e-9])
    table = [[values.get((group, layer)) for layer in layers] for group in groups]
    heat = Heat(
        groups, [str(one) for one in layers], table, "layer", "", middle, reach, written="{:.2f}", one_sided=one_sided
    )
    return Figure(caption, heat_map(caption, heat))


def _more(inspection: Row) -> list[Table]:
    rows = [
        (one["field"], one["other"], str(one["vlm"]), str(one["theirs"]), one["weight"], one["meaning"])
        for one in inspection.get("differences", [])
    ]
    bases = [(one["base"], one["donor_ratio"], one["vlm_ratio"]) for one in inspection.get("bases", [])]
    return [
        Table("differences", ("field", "checkpoint", "VLM", "theirs", "weight", "meaning"), rows),
        Table("candidates for the donor's base", ("base", "‖τ‖/‖W‖", "‖τ_vlm‖/‖W‖"), bases),
    ]


def spectra(found: Collected) -> list[Section]:
    """Singular values by layer, and how many directions the task vector really has."""
    return [_spectra(run, place) for place, run in enumerate(found.spectra)]


def _spectra(run: Run, place: int) -> Section:
    rows = [row for row in run.rows if row["shown"]]
    kinds = list(dict.fromkeys(_kind(row["name"]) for row in rows))
    curves = [_curve(kind, rows) for kind in kinds]
    share = [row["effective_rank"] / min(row["shape"]) for row in rows]
    eight = sum(row["first"]["8"] * row["norm"] ** 2 for row in rows) / sum(row["norm"] ** 2 for row in rows)
    title = (
        f"The donor's change is concentrated: 8 directions per matrix hold {100 * eight:.0f} % of its energy"
        if eight > 0.5
        else f"The donor's change is spread out: 8 directions per matrix hold {100 * eight:.0f} % of its energy"
    )
    layers = sorted({row["layer"] for row in rows if row["layer"] is not None})
    ranks = {(_kind(row["name"]), row["layer"]): row["effective_rank"] for row in rows}
    top = max(ranks.values())
    heat = Heat(
        kinds, [str(one) for one in layers], [[ranks.get((kind, layer)) for layer in layers] for kind in kinds],
        "layer", "", 0.0, top, " directions", "{:.1f}", one_sided=True,
    )  # fmt: skip
    figures = [
        Figure(
            "Singular values of τ, mean over layers",
            line_chart(
                "singular values", curves, Axes("direction, from the largest", "s / s of the first", log_y=True)
            ),
            "relative to the first one of their matrix",
            legend=legend(curves),
        ),
        Figure("Effective rank of τ by layer", heat_map("effective rank", heat), "(Σ s²)² / Σ s⁴, in directions"),
    ]
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
    text = [
        f"An effective rank is {number(100 * min(share), 2)} to {number(100 * max(share), 2)} % of the directions a "
        "matrix has. Truncation keeps the first directions and drops the rest; FRISM weighs every direction by itself."
    ]
    return Section(
        f"spectra-{place}" if place else "spectra", topic("spectra", run, place), title, text, figures, [table]
    )


def _kind(name: str) -> str:
    return name.removesuffix(".weight").rsplit(".", 1)[-1]


def _curve(kind: str, rows: Sequence[Row]) -> Series:
    """The mean over layers of the relative singular values; the indices of one kind of matrix are the same."""
    own = [row["shown"] for row in rows if _kind(row["name"]) == kind]
    count = min(len(shown) for shown in own)
    dots = []
    for place in range(count):
        index = own[0][place][0]
        mean = sum(shown[place][1] / shown[0][1] for shown in own) / len(own)
        dots.append(Dot(index + 1, mean, f"{kind}, direction {index + 1}: {number(mean)} of the first"))
    thinned = [dot for place, dot in enumerate(dots) if place % max(1, count // 12) == 0]
    return Series(kind, tuple(thinned), data={"matrix": kind})
