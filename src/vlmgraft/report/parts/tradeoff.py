"""Perception against reasoning: every measured point, with the Pareto front."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from vlmgraft.report.charts import Axes, Dot, Series, legend, line_chart
from vlmgraft.report.collect import Collected, Run
from vlmgraft.report.sections import Choice, Figure, Section, Table, topic
from vlmgraft.report.svg import number

Row = Mapping[str, Any]
SIGHT = 0.01
"""A point keeps its sight when its perception is at most a point below the VLM's."""


def tradeoff(found: Collected) -> list[Section]:
    """One section per file of points."""
    return [_section(run, place) for place, run in enumerate(found.points)]


def _section(run: Run, place: int) -> Section:
    rows = [row for row in run.rows if row.get("drawn", True)]
    methods = list(dict.fromkeys(row["method"] for row in rows))
    front = _front(rows)
    curves = [_series(method, rows, front) for method in methods]
    figures = [
        Figure(
            "Perception against reasoning",
            line_chart(
                "perception against reasoning", curves, Axes("perception, % right", "reasoning, % right"), 460, 360
            ),
            "up and to the right is better; a ring marks the Pareto front, crosses are 95 % intervals",
            legend=legend(curves),
        )
    ]
    drifting = [row for row in rows if row.get("kl")]
    if drifting:
        by_drift = [_drift_series(method, rows) for method in methods]
        axes = Axes("KL from the VLM, nats per token", "reasoning, % right", log_x=True)
        figures.append(
            Figure(
                "Reasoning bought per drift",
                line_chart("KL against reasoning", by_drift, axes, 460, 360),
                "KL is measured on held-out perception questions; the VLM itself has none and is not shown",
                legend=legend(by_drift),
            )
        )
    table = Table(
        f"points of {run.folder.name}",
        ("method", "setting", "reasoning %", "low", "high", "perception %", "low", "high", "KL", "front"),
        [
            [
                row["method"],
                row["setting"],
                *_percent(row["reasoning"]),
                *_percent(row["perception"]),
                row.get("kl"),
                on,
            ]
            for row, on in zip(rows, front, strict=True)
        ],
        [{"method": row["method"]} for row in rows],
    )
    choice = Choice("method", "show", {method: method for method in methods})
    text = _text(rows)
    name = f"tradeoff-{place}" if place else "tradeoff"
    return Section(name, topic("trade-off", run, place), finding(rows), text, figures, [table], [choice])


def _front(rows: Sequence[Row]) -> list[bool]:
    """No other row is at least as good in both, and better in one."""
    points = [(row["perception"]["mean"], row["reasoning"]["mean"]) for row in rows]
    return [not any(o != p and o[0] >= p[0] and o[1] >= p[1] for o in points) for p in points]


def _percent(estimate: Mapping[str, float]) -> tuple[float, float, float]:
    return tuple(round(100 * estimate[key], 2) for key in ("mean", "low", "high"))  # type: ignore[return-value]


def _tip(row: Row) -> str:
    said = [row["method"], row["setting"]] if row["setting"] else [row["method"]]
    both = [f"{kind} {_percent(row[kind])[0]:.1f} %" for kind in ("reasoning", "perception")]
    kl = [f"KL {number(row['kl'])}"] if row.get("kl") is not None else []
    return ", ".join([*said, *both, *kl])


def _series(method: str, rows: Sequence[Row], front: Sequence[bool]) -> Series:
    own = [(row, on) for row, on in zip(rows, front, strict=True) if row["method"] == method]
    own.sort(key=lambda pair: pair[0]["order"])
    dots = []
    for row, on in own:
        (x, *x_range), (y, *y_range) = _percent(row["perception"]), _percent(row["reasoning"])
        dots.append(Dot(x, y, _tip(row), (x_range[0], x_range[1]), (y_range[0], y_range[1]), on))
    return Series(method, tuple(dots), data={"method": method})


def _drift_series(method: str, rows: Sequence[Row]) -> Series:
    own = sorted((row for row in rows if row["method"] == method and row.get("kl")), key=lambda row: row["kl"])
    dots = []
    for row in own:
        y, low, high = _percent(row["reasoning"])
        dots.append(Dot(row["kl"], y, _tip(row), y_range=(low, high)))
    return Series(method, tuple(dots), data={"method": method})


def vlm_row(rows: Sequence[Row]) -> Row | None:
    """The VLM's own row."""
    return next((row for row in rows if row["method"] == "VLM"), None)


def best(rows: Sequence[Row]) -> Row | None:
    """The best reasoning among the points that keep their sight; None without a VLM to compare with."""
    vlm = vlm_row(rows)
    if vlm is None:
        return None
    seeing = [row for row in rows if row["perception"]["mean"] >= vlm["perception"]["mean"] - SIGHT]
    return max(seeing, key=lambda row: row["reasoning"]["mean"])


def finding(rows: Sequence[Row]) -> str:
    """The title: what the best point that keeps its sight gains."""
    top, vlm = best(rows), vlm_row(rows)
    if top is None or vlm is None:
        return "Reasoning and perception of every point"
    if top is vlm:
        return "No point reasons better than the VLM and still sees as well"
    return (
        f"At unchanged perception, {top['method']} reasons best: {100 * top['reasoning']['mean']:.0f} % "
        f"against the VLM's {100 * vlm['reasoning']['mean']:.0f} %"
    )


def _text(rows: Sequence[Row]) -> list[str]:
    vlm = vlm_row(rows)
    if vlm is None:
        return []
    said = []
    for method in dict.fromkeys(row["method"] for row in rows if row is not vlm):
        own = [row for row in rows if row["method"] == method]
        seeing = [row for row in own if row["perception"]["mean"] >= vlm["perception"]["mean"] - SIGHT]
        if seeing:
            top = max(seeing, key=lambda row: row["reasoning"]["mean"])
            said.append(f"{method} {100 * top['reasoning']['mean']:.1f} %")
        else:
            said.append(f"{method}: no point sees as well")
    return [
        "Every point is one setting, asked the same questions. Best reasoning within one point of the VLM's perception "
        f"({100 * vlm['perception']['mean']:.1f} %): {'; '.join(said)}. These points were picked and measured on the "
        "same questions, so their lead is somewhat flattered."
    ]
