"""What the gates let through: by layer and rank, by matrix, as a histogram, and how the training went."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from vlmgraft.report.charts import Axes, Dot, Heat, Series, bar_chart, heat_map, line_chart
from vlmgraft.report.collect import BINS, Collected, GatedRun
from vlmgraft.report.sections import Figure, Section, Table, topic
from vlmgraft.report.svg import number

Row = Mapping[str, Any]


def gates(found: Collected) -> list[Section]:
    """One section per gates folder."""
    return [_section(run, place) for place, run in enumerate(found.gates)]


def _section(run: GatedRun, place: int) -> Section:
    rows = [row for row in run.matrices if row["layer"] is not None]
    layers = sorted({row["layer"] for row in rows})
    names = list(dict.fromkeys(row["projection"] for row in rows))
    figures = []
    if rows:
        by_rank = [
            [_mean([row for row in rows if row["layer"] == layer], bin_) for bin_ in range(BINS)] for layer in layers
        ]
        figures.append(_by_rank(by_rank, layers))
        figures.append(_by_matrix(rows, layers, names))
        if any(row["injected"] is not None for row in rows):
            figures.append(_injected(rows, layers, names))
    figures.append(_histogram(run))
    figures += _training(run.log)
    return Section(
        f"gates-{place}" if place else "gates",
        topic("gates", run, place),
        _title(run),
        _text(run),
        figures,
        [_matrices(run), *_log(run)],
    )


def _mean(rows: Sequence[Row], bin_: int, key: str = "by_rank") -> float | None:
    values = [row[key][bin_] for row in rows if row[key][bin_] is not None]
    return sum(values) / len(values) if values else None


def _by_rank(values: list[list[float | None]], layers: Sequence[int]) -> Figure:
    heat = Heat(
        [str(layer) for layer in layers],
        [f"{place + 1}" for place in range(BINS)],
        values,
        f"{BINS}ths of the singular directions, the largest first",
        "layer",
        0.5,
        0.5,
        written=None,
    )
    note = "means; 0.5 is where training starts: blue was opened, orange was closed"
    return Figure("How far gates are open, by layer and rank", heat_map("gates by layer and rank", heat), note)


def _by_matrix(rows: Sequence[Row], layers: Sequence[int], names: Sequence[str]) -> Figure:
    found = {(row["projection"], row["layer"]): row["open"] for row in rows}
    table = [[found.get((name, layer)) for layer in layers] for name in names]
    heat = Heat(names, [str(one) for one in layers], table, "layer", "", 0.5, 0.5, written="{:.2f}")
    return Figure("Mean opening by matrix", heat_map("mean opening by matrix", heat), "all directions count alike")


def _injected(rows: Sequence[Row], layers: Sequence[int], names: Sequence[str]) -> Figure:
    found = {(row["projection"], row["layer"]): row["injected"] for row in rows}
    table = [[found.get((name, layer)) for layer in layers] for name in names]
    heat = Heat(names, [str(one) for one in layers], table, "layer", "", 0.25, 0.75, written="{:.2f}", reach_low=0.25)
    note = "Σ(σ(g)·s)² / Σs²; 0.25 is where training starts, with every gate half open"
    return Figure("Share of the task vector's energy that is injected", heat_map("injected energy", heat), note)


def _histogram(run: GatedRun) -> Figure:
    total = sum(run.histogram) or 1
    count = len(run.histogram)
    bars = [
        (
            number(place / count, 2) if place % 4 == 0 else "",
            100 * value / total,
            f"opening {place / count:.2f} to {(place + 1) / count:.2f}: {value} gates, {100 * value / total:.1f} %",
        )
        for place, value in enumerate(run.histogram)
    ]
    return Figure(
        "Gates by how far they are open", bar_chart("histogram of gates", bars, "σ(g): 0 closed, 1 open", "% of gates")
    )


def _training(log: Sequence[Row]) -> list[Figure]:
    """KL and injected energy during training."""
    figures = []
    for key, caption, axis in (
        ("kl", "KL from the VLM during training", "KL, nats per token"),
        ("energy", "Injected energy during training", "share of Σ‖τ‖²"),
    ):
        rows = [row for row in log if row.get(key) is not None]
        if len(rows) > 1:
            dots = tuple(Dot(row["step"], row[key], f"step {row['step']}: {number(row[key])}") for row in rows)
            chart = line_chart(caption, [Series(key, dots)], Axes("step", axis), height=240)
            figures.append(Figure(caption, chart))
    return figures


def _title(run: GatedRun) -> str:
    rows = [row for row in run.matrices if row["layer"] is not None]
    if not rows:
        return "What the gates let through"
    total = sum(row["directions"] for row in rows)
    opened = sum(row["directions"] * row["above_half"] for row in rows) / total
    first, last = (_mean(rows, bin_) for bin_ in (0, BINS - 1))
    if first is None or last is None:
        return f"{100 * opened:.0f} % of the gates were opened"
    lead = "open" if first > 0.55 else "close" if first < 0.45 else "are divided"
    rest = "go either way" if abs(last - 0.5) < 0.05 else "open" if last > 0.5 else "close"
    return f"The largest directions {lead} (mean {first:.2f}), the smallest {rest} (mean {last:.2f})"


def _text(run: GatedRun) -> list[str]:
    settings = run.settings
    energy = settings.get("energy")
    how = {
        "energy": "the published term, which rewards injected energy",
        "donor": "donor matching, which rewards answers like the donor's on text questions",
    }
    said = []
    if "inject" in settings:
        weight = settings.get("inject_weight")
        said.append(
            f"λ {number(settings.get('scale'))}, {settings.get('steps')} steps, injection by "
            f"{how.get(settings['inject'], settings['inject'])}, weight {number(weight)}."
        )
    said.append(
        "A gate opens where what it brings outweighs the drift it causes on the VLM's own answers, and closes where it "
        "does not."
    )
    said += _spread(run)
    if energy is not None:
        said.append(f"All gates together inject {100 * energy:.1f} % of the task vector's energy.")
    rows = [row for row in run.matrices if row["layer"] is not None and row["injected"] is not None]
    if rows:
        top, low = max(rows, key=lambda row: row["injected"]), min(rows, key=lambda row: row["injected"])
        said.append(
            f"Most is let through in {top['projection']} of layer {top['layer']} ({100 * top['injected']:.0f} %), "
            f"least in {low['projection']} of layer {low['layer']} ({100 * low['injected']:.0f} %)."
        )
    return said


def _spread(run: GatedRun) -> list[str]:
    """How far gates of large and of small directions scatter: a mean of one half may hide gates at both ends."""
    rows = [row for row in run.matrices if row["layer"] is not None]
    first, last = (_mean(rows, bin_, "spread") for bin_ in (0, BINS - 1))
    if first is None or last is None:
        return []
    return [
        f"Within a matrix the gates of the largest sixteenth of directions scatter by {first:.2f} (standard "
        f"deviation), those of the smallest by {last:.2f}. The optimiser moves every gate at about the same pace, "
        "however small its singular value; what the small ones do matters little, because they carry little energy."
    ]


def _matrices(run: GatedRun) -> Table:
    columns = ("matrix", "layer", "directions", "mean opening", "share above ½", "energy injected")
    keys = ("name", "layer", "directions", "open", "above_half", "injected")
    bins = [f"part {place + 1}" for place in range(BINS)]
    rows = [(*(row[key] for key in keys), *row["by_rank"]) for row in run.matrices]
    return Table("gates by matrix", (*columns, *bins), rows)


def _log(run: GatedRun) -> list[Table]:
    if not run.log:
        return []
    keys = [key for key, value in run.log[0].items() if isinstance(value, int | float)]
    return [Table("training of the gates", keys, [[row.get(key) for key in keys] for row in run.log])]
