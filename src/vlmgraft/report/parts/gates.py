"""The gates' openness by layer and rank and by matrix, as a histogram, and the course of the training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from vlmgraft.report.charts import Bars, Dot, Heat, Lines, Series
from vlmgraft.report.gate_folder import BINS, GatedRun
from vlmgraft.report.sections import Figure, Section, Table
from vlmgraft.report.text import number

Row = Mapping[str, Any]


def gates(run: GatedRun) -> Section:
    """One gates folder."""
    rows = [row for row in run.matrices if row["layer"] is not None]
    figures = []
    if rows:
        figures.append(_by_rank(rows))
        for key, caption, settings, note in MAPS:
            values = {(row["projection"], row["layer"]): row[key] for row in rows}
            if any(value is not None for value in values.values()):
                figures.append(Figure(caption, Heat.by_layer(values, **settings), note))
    figures += [_histogram(run), *_training(run.log)]
    return Section("gates", "gates", _title(rows), _text(run, rows), figures, [_matrices(run), *_log(run)])


MAPS: tuple[tuple[str, str, dict[str, float], str], ...] = (
    ("open", "Mean opening by matrix", {"middle": 0.5, "reach": 0.5}, "all directions count alike"),
    (
        "injected",
        "Share of the task vector's energy that is injected",
        {"middle": 0.25, "reach": 0.75, "reach_low": 0.25},
        "Σ(σ(g)·s)² / Σs²; 0.25 is where training starts, with every gate half open",
    ),
)


def _mean(rows: Sequence[Row], bin_: int, key: str = "by_rank") -> float | None:
    values = [row[key][bin_] for row in rows if row[key][bin_] is not None]
    return sum(values) / len(values) if values else None


def _by_rank(rows: Sequence[Row]) -> Figure:
    layers = sorted({row["layer"] for row in rows})
    values = [[_mean([row for row in rows if row["layer"] == layer], bin_) for bin_ in range(BINS)] for layer in layers]
    across = f"{BINS}ths of the singular directions, the largest first"
    names, parts = [str(layer) for layer in layers], [str(bin_ + 1) for bin_ in range(BINS)]
    heat = Heat(names, parts, values, across, "layer", 0.5, 0.5, written=None)
    note = "means; 0.5 is where training starts: blue was opened, orange was closed"
    return Figure("How far gates are open, by layer and rank", heat, note)


def _histogram(run: GatedRun) -> Figure:
    total, count = sum(run.histogram) or 1, len(run.histogram)
    bars = [
        (
            number(index / count, 2) if index % 4 == 0 else "",
            100 * gates / total,
            f"opening {index / count:.2f} to {(index + 1) / count:.2f}: {gates} gates, {100 * gates / total:.1f} %",
        )
        for index, gates in enumerate(run.histogram)
    ]
    return Figure("Gates by how far they are open", Bars(bars, "σ(g): 0 closed, 1 open", "% of gates"))


def _training(log: Sequence[Row]) -> list[Figure]:
    """KL and injected energy during training."""
    figures = []
    for key, caption, axis in (
        ("kl", "KL from the VLM during training", "KL, nats per token"),
        ("energy", "Injected energy during training", "share of Σ‖τ‖²"),
    ):
        dots = [
            Dot(row["step"], row[key], f"step {row['step']}: {number(row[key])}")
            for row in log
            if row.get(key) is not None
        ]
        if len(dots) > 1:
            figures.append(Figure(caption, Lines([Series(key, tuple(dots))], "step", axis, size=(4.6, 2.8))))
    return figures


def _title(rows: Sequence[Row]) -> str:
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


def _text(run: GatedRun, rows: Sequence[Row]) -> list[str]:
    settings = run.settings
    energy = settings.get("energy")
    how = {
        "energy": "the published term, which rewards injected energy",
        "donor": "donor matching, which rewards answers like the donor's on text questions",
    }
    text = []
    if settings.get("inject"):
        weight = settings.get("inject_weight")
        text.append(
            f"λ {number(settings.get('scale'))}, {settings.get('steps')} steps, injection by "
            f"{how.get(settings['inject'], settings['inject'])}, weight {number(weight)}."
        )
    text.append(
        "A gate opens where what it brings outweighs the KL it causes on the VLM's own answers, and closes where it "
        "does not."
    )
    text += _spread(rows)
    if energy is not None:
        text.append(f"All gates together inject {100 * energy:.1f} % of the task vector's energy.")
    injected = sorted((row for row in rows if row["injected"] is not None), key=lambda row: row["injected"])
    if injected:
        low, top = injected[0], injected[-1]
        text.append(
            f"Most is let through in {top['projection']} of layer {top['layer']} ({100 * top['injected']:.0f} %), "
            f"least in {low['projection']} of layer {low['layer']} ({100 * low['injected']:.0f} %)."
        )
    return text


def _spread(rows: Sequence[Row]) -> list[str]:
    """Spread of the gates of the largest and smallest directions: a mean of one half may hide gates at both ends."""
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
    bins = [f"part {bin_ + 1}" for bin_ in range(BINS)]
    rows = [(*(row[key] for key in keys), *row["by_rank"]) for row in run.matrices]
    return Table("gates by matrix", (*columns, *bins), rows)


def _log(run: GatedRun) -> list[Table]:
    if not run.log:
        return []
    keys = [key for key, value in run.log[0].items() if isinstance(value, int | float)]
    return [Table("training of the gates", keys, [[row.get(key) for key in keys] for row in run.log])]
