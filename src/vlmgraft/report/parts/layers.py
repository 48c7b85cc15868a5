"""Knock-outs by layer, and bands of singular directions over λ."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from vlmgraft.report.charts import Dot, Heat, Lines, Series
from vlmgraft.report.collect import Run
from vlmgraft.report.sections import Figure, Filter, Section, Table
from vlmgraft.report.text import number

Row = Mapping[str, Any]
KINDS = ("reasoning", "perception")
NAMES = {"VLM": "the VLM", "merged": "the merged model", "model": "the model"}
MODES = {
    "constant": "constant 1/d_out",
    "zero": "zero",
    "mean": "mean output",
    "restore": "un-merge",
    "only": "merge only this",
}


def knockout(run: Run) -> Section:
    """The section of one knock-out file."""
    cells = [row for row in run.rows if row["mode"] != "intact"]
    models = list(dict.fromkeys(row["model"] for row in cells))
    modes = list(dict.fromkeys(row["mode"] for row in cells))
    figures = [
        _map(cells, model, mode, kind)
        for mode in sorted(modes, key=list(MODES).index)
        for model in models
        if any(row["model"] == model and row["mode"] == mode for row in cells)
        for kind in KINDS
    ]
    columns = ("model", "part", "layer", "mode", "against")
    heads = [f"{kind} {what}" for kind in KINDS for what in ("%", "change", "low", "high")]
    intact = [row for row in run.rows if row["mode"] == "intact"]
    blank = (None, None, None)
    rows: list[Any] = [
        [row["model"], "", None, "intact", "", *(x for kind in KINDS for x in (100 * row[kind]["mean"], *blank))]
        for row in intact
    ]
    rows += [[*(row[key] for key in columns), *(x for kind in KINDS for x in _figures(row, kind))] for row in cells]
    data = [{"model": row[0], **({"mode": row[3]} if row[3] != "intact" else {})} for row in rows]
    hidden = tuple(mode for mode in modes if mode not in (_gentlest(cells), "restore", "only"))
    filters = [
        Filter("mode", "a block becomes", {mode: MODES[mode] for mode in modes}, hidden),
        Filter("model", "in", {model: NAMES[model] for model in models}),
        Filter("kind", "change of", {kind: kind for kind in KINDS}),
    ]
    table = Table("knock-out", (*columns, *heads), rows, data)
    return Section("layers", "layers", _finding(cells), _text(cells, intact), figures, [table], filters)


def _figures(row: Row, kind: str) -> tuple[float, float, float, float]:
    change = row[f"{kind}_change"]
    return 100 * row[kind]["mean"], 100 * change["mean"], 100 * change["low"], 100 * change["high"]


def _map(cells: Sequence[Row], model: str, mode: str, kind: str) -> Figure:
    rows = [row for row in cells if row["model"] == model and row["mode"] == mode]
    values = {(row["part"], row["layer"]): 100 * row[f"{kind}_change"]["mean"] for row in rows}
    reach = max([abs(value) for value in values.values()] + [5.0]) if mode in ("restore", "only") else 100.0
    caption = {
        "restore": f"{kind.capitalize()} when a block is un-merged",
        "only": f"{kind.capitalize()} when only this block is merged",
    }.get(mode, f"{kind.capitalize()} of {NAMES[model]} without a block")
    note = f"change in points; block set to: {MODES[mode]}" + ("; against the VLM" if mode == "only" else "")
    heat = Heat.by_layer(values, reach=reach, unit=" points", written="{:+.0f}")
    return Figure(caption, heat, note, {"mode": mode, "model": model, "kind": kind})


def centre(cells: Sequence[Row], model: str, mode: str, kind: str) -> float | None:
    """Σ layer · loss / Σ loss over the rows with both blocks knocked out, else over all rows; None without loss."""
    rows = [row for row in cells if row["model"] == model and row["mode"] == mode]
    rows = [row for row in rows if row["part"] == "both"] or rows
    losses = [(row["layer"], max(0.0, -row[f"{kind}_change"]["mean"])) for row in rows]
    total = sum(loss for _, loss in losses)
    return sum(layer * loss for layer, loss in losses) / total if total > 0 else None


def _gentlest(cells: Sequence[Row]) -> str:
    """The mildest knock-out mode among the cells; empty if there is none."""
    modes = {row["mode"] for row in cells}
    return next((mode for mode in ("mean", "zero", "constant") if mode in modes), "")


def _lost(cells: Sequence[Row], kind: str) -> str:
    """Layers where a part's change, with its whole interval, is below zero."""
    layers = sorted({row["layer"] for row in cells if row[f"{kind}_change"]["high"] < 0})
    return ", ".join(map(str, layers)) or "none"


def _finding(cells: Sequence[Row]) -> str:
    mode = _gentlest(cells)
    models = {row["model"] for row in cells}
    model = "merged" if "merged" in models else next(iter(models), "")
    reasoning, perception = (centre(cells, model, mode, kind) for kind in KINDS)
    if reasoning is None or perception is None:
        return "What each layer carries"
    gap = reasoning - perception
    where = "later than" if gap > 0.25 else "earlier than" if gap < -0.25 else "in the same layers as"
    return (
        f"In {NAMES[model]} reasoning sits {where} perception: centre of loss at layer "
        f"{number(reasoning, 2)} against {number(perception, 2)}"
    )


def _text(cells: Sequence[Row], intact: Sequence[Row]) -> list[str]:
    text = [
        "Each cell changes one block of the model in memory and asks the same questions again. Bring Reason to Vision "
        "(arXiv 2505.05464) found perception in early layers, reasoning in middle and late ones, and reasoning "
        "everywhere after merging. Whether that holds here can be read from the maps. Reasoning about an image needs "
        "sight: a layer that perception cannot do without takes reasoning with it."
    ]
    levels = [
        f"{NAMES[row['model']]} {100 * row['reasoning']['mean']:.1f} % reasoning, "
        f"{100 * row['perception']['mean']:.1f} % perception"
        for row in intact
    ]
    if levels:
        text.append(f"Intact: {'; '.join(levels)}.")
    mode = _gentlest(cells)
    for model in dict.fromkeys(row["model"] for row in cells if row["mode"] == mode):
        rows = [row for row in cells if row["model"] == model and row["mode"] == mode]
        text.append(
            f"With a block knocked out ({MODES[mode]}), {NAMES[model]} loses reasoning beyond chance in layers "
            f"{_lost(rows, 'reasoning')} and perception in layers {_lost(rows, 'perception')}; the centre of loss is "
            f"at layer {number(centre(cells, model, mode, 'reasoning'), 2)} and "
            f"{number(centre(cells, model, mode, 'perception'), 2)}."
        )
    only = [row for row in cells if row["mode"] == "only" and row["part"] == "both"] or [
        row for row in cells if row["mode"] == "only"
    ]
    if only:
        top = max(only, key=lambda row: row["reasoning_change"]["mean"])
        change = top["reasoning_change"]
        text.append(
            f"Merged alone, layer {top['layer']} ({top['part']}) brings the most: {100 * change['mean']:+.1f} points "
            f"of reasoning [{100 * change['low']:.1f}, {100 * change['high']:.1f}]."
        )
    return text


def bands(run: Run) -> Section:
    """The section of one file of bands of singular directions."""
    zero = next((row for row in run.rows if row["scale"] == 0), None)
    order = list(dict.fromkeys(row["band"] for row in run.rows if row["scale"]))
    figures = [
        Figure(
            f"{kind.capitalize()} when one band is injected",
            Lines([_band(run.rows, band, kind, zero) for band in order], "λ", f"{kind}, % right"),
        )
        for kind in KINDS
    ]
    heads = [head for kind in KINDS for head in (f"{kind} %", "low", "high")]
    names = ("band", "λ", "share of energy", "λ·‖band‖/‖τ‖", *heads, "KL")
    rows: list[Any] = [
        [_name(row), row["scale"], row["energy"], row["injected"]]
        + [100 * row[kind][key] for kind in KINDS for key in ("mean", "low", "high")]
        + [row.get("kl")]
        for row in run.rows
    ]
    labels = [_name({"band": band, "of": run.rows[0]["of"]}) for band in order]
    filters = [Filter("band", "show", {label: label for label in labels})]
    data = [{"band": row[0]} if row[1] else {} for row in rows]
    table = Table("bands of directions", names, rows, data)
    return Section("directions", "directions", _rank_finding(run.rows), _rank_text(run), figures, [table], filters)


def _name(row: Row) -> str:
    return "all directions" if row["band"] is None else f"band {row['band'] + 1} of {row['of']}"


def _band(rows: Sequence[Row], band: int | None, kind: str, zero: Row | None) -> Series:
    points = [row for row in rows if row["band"] == band and row["scale"]]
    points = ([zero] if zero else []) + sorted(points, key=lambda row: row["scale"])
    name = _name(points[-1])
    dots = tuple(
        Dot(
            row["scale"],
            100 * row[kind]["mean"],
            f"{name}, λ {number(row['scale'])}: {kind} {100 * row[kind]['mean']:.1f} %",
            y_range=(100 * row[kind]["low"], 100 * row[kind]["high"]),
        )
        for row in points
    )
    return Series(name, dots, {"band": name})


def _peak(rows: Sequence[Row], band: int | None) -> Row:
    return max((row for row in rows if row["band"] == band and row["scale"]), key=lambda row: row["reasoning"]["mean"])


def _rank_finding(rows: Sequence[Row]) -> str:
    bands = [band for band in dict.fromkeys(row["band"] for row in rows if row["scale"]) if band is not None]
    if not bands:
        return "What bands of directions carry"
    best = max((_peak(rows, band) for band in bands), key=lambda row: row["reasoning"]["mean"])
    return (
        f"{_name(best).capitalize()} carries the most reasoning by itself: {100 * best['reasoning']['mean']:.0f} % at "
        f"λ {number(best['scale'])}"
    )


def _rank_text(run: Run) -> list[str]:
    rows = run.rows
    how = {"rank": "equal numbers of directions", "energy": "equal shares of the energy Σs²"}[rows[0]["by"]]
    peaks = []
    for band in dict.fromkeys(row["band"] for row in rows if row["scale"]):
        top = _peak(rows, band)
        peaks.append(f"{_name(top)} at λ {number(top['scale'])} ({100 * top['reasoning']['mean']:.1f} %)")
    return [
        f"The singular directions of every matrix of τ are cut into bands of {how}, the largest singular values first; "
        "one band at a time is added to the VLM (FRISM, figure 3). Peaks of reasoning: " + "; ".join(peaks) + "."
    ]
