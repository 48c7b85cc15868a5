"""Perception against reasoning: every measured point, with the Pareto front."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from vlmgraft.report.charts import Dot, Lines, Series
from vlmgraft.report.collect import Run
from vlmgraft.report.sections import Figure, Filter, Section, Table
from vlmgraft.report.text import number

Row = Mapping[str, Any]
SLACK = 0.01
"""A point preserves perception if its accuracy is at most this much below the VLM's."""


def tradeoff(run: Run, styles: Mapping[str, int]) -> Section:
    """One file of points; `styles` from `method_styles`, so that a method looks the same in all charts."""
    rows = [row for row in run.rows if row.get("drawn", True)]
    methods = list(dict.fromkeys(row["method"] for row in rows))
    front = _front(rows)
    note = "up and to the right is better; a ring marks the Pareto front, crosses are 95 % intervals"
    figures = [Figure("Perception against reasoning", tradeoff_chart(rows, styles), note)]
    with_kl = [row for row in rows if row.get("kl")]
    if with_kl:
        series = [
            _series(method, with_kl, styles, x="kl") for method in dict.fromkeys(row["method"] for row in with_kl)
        ]
        chart = Lines(series, "KL from the VLM, nats per token", "reasoning, % right", log_x=True)
        note = "KL is measured on held-out perception questions; the VLM itself has none and is not shown"
        figures.append(Figure("Reasoning bought per drift", chart, note))
    columns = ("method", "setting", "reasoning %", "low", "high", "perception %", "low", "high", "KL", "front")
    table = Table(
        f"points of {run.folder.name}",
        columns,
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
    filters = [Filter("method", "show", {method: method for method in methods})]
    return Section("tradeoff", "trade-off", finding(rows), _text(rows), figures, [table], filters)


def tradeoff_chart(rows: Sequence[Row], styles: Mapping[str, int] | None = None) -> Lines:
    """The trade-off as a chart.

    Args:
        rows: with `method`, `setting` (text), `order`, and `reasoning` and `perception` as {mean, low, high} in [0, 1].
    """
    styles, front = styles or method_styles(rows), _front(rows)
    best_rows = [row for row, on in zip(rows, front, strict=True) if on]
    series = [_series(method, rows, styles, best_rows) for method in dict.fromkeys(row["method"] for row in rows)]
    return Lines(series, "perception, % right", "reasoning, % right")


def method_styles(rows: Sequence[Row]) -> dict[str, int]:
    """Method → number of its colour and mark: the VLM 0, the others in the order of the rows."""
    methods = dict.fromkeys(row["method"] for row in rows if row["method"] != "VLM")
    return {"VLM": 0, **{method: number for number, method in enumerate(methods, start=1)}}


def _front(rows: Sequence[Row]) -> list[bool]:
    """Whether no other row is at least as good in both, and better in one."""
    points = [(row["perception"]["mean"], row["reasoning"]["mean"]) for row in rows]
    return [not any(o != p and o[0] >= p[0] and o[1] >= p[1] for o in points) for p in points]


def _percent(estimate: Mapping[str, float]) -> tuple[float, float, float]:
    mean, low, high = (round(100 * estimate[key], 2) for key in ("mean", "low", "high"))
    return mean, low, high


def _tip(row: Row) -> str:
    name = [row["method"], row["setting"]] if row["setting"] else [row["method"]]
    both = [f"{kind} {_percent(row[kind])[0]:.1f} %" for kind in ("reasoning", "perception")]
    kl = [f"KL {number(row['kl'])}"] if row.get("kl") is not None else []
    return ", ".join([*name, *both, *kl])


def _series(
    method: str, rows: Sequence[Row], styles: Mapping[str, int], front: Sequence[Row] = (), x: str = "order"
) -> Series:
    """Reasoning of one method over its perception, with rings on the front, sorted by `x`; over KL if `x` is "kl"."""
    points = sorted((row for row in rows if row["method"] == method), key=lambda row: row[x])
    dots = []
    for row in points:
        seen, *seen_range = _percent(row["perception"])
        right, *right_range = _percent(row["reasoning"])
        across = (row["kl"], None) if x == "kl" else (seen, (seen_range[0], seen_range[1]))
        label = row["setting"] if len(points) > 1 else ""
        dots.append(Dot(across[0], right, _tip(row), across[1], (right_range[0], right_range[1]), row in front, label))
    return Series(method, tuple(dots), {"method": method}, styles[method])


def vlm_row(rows: Sequence[Row]) -> Row | None:
    """The VLM's own row."""
    return next((row for row in rows if row["method"] == "VLM"), None)


def best(rows: Sequence[Row]) -> Row | None:
    """The row with the best reasoning among those that preserve perception; None without a VLM row."""
    vlm = vlm_row(rows)
    if vlm is None:
        return None
    seeing = [row for row in rows if row["perception"]["mean"] >= vlm["perception"]["mean"] - SLACK]
    return max(seeing, key=lambda row: row["reasoning"]["mean"])


def finding(rows: Sequence[Row]) -> str:
    """The section's title: the gain of the best point that preserves perception."""
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
    gains, chosen = [], []
    for method in dict.fromkeys(row["method"] for row in rows if row is not vlm):
        top = best([vlm, *(row for row in rows if row["method"] == method)])
        if top is None or top is vlm:
            gains.append(f"{method}: no point reasons better and sees as well")
        else:
            gains.append(f"{method} {100 * top['reasoning']['mean']:.1f} %")
        chosen += [method] if all(row.get("chosen_on") for row in rows if row["method"] == method) else []
    how = "These points were picked and measured on the same questions, so their lead is somewhat flattered."
    if chosen:
        how = f"Chosen on validation questions and measured here on others: {', '.join(chosen)}. Every other point is "
        how += "picked and measured on the same questions, which flatters it somewhat."
    return [
        "Every point is one setting, asked the same questions. Best reasoning within one point of the VLM's perception "
        f"({100 * vlm['perception']['mean']:.1f} %): {'; '.join(gains)}. {how}"
    ]
