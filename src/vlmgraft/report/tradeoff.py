"""The trade-off picture: reasoning against perception, one line or point per method, with 95 % intervals."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

MARKS = ("o", "s", "D", "^", "v", "P", "X", "*")
COLOURS = ("#000000", "#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#F0E442")
"""Okabe and Ito's palette, which colour-blind readers can tell apart."""


def draw_tradeoff(rows: Sequence[Mapping[str, Any]], path: Path, title: str) -> None:
    """Write the picture as SVG or PNG, by the suffix of `path`.

    Args:
        rows: with `method`, `setting` (text), and `reasoning` and `perception` as {mean, low, high} in [0, 1].
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.2, 4.6), layout="constrained")
    axes = figure.add_subplot()
    for index, method in enumerate(dict.fromkeys(row["method"] for row in rows)):
        own = sorted((row for row in rows if row["method"] == method), key=lambda row: row["order"])
        centre = {axis: [100 * row[axis]["mean"] for row in own] for axis in ("perception", "reasoning")}
        spread = {
            axis: [
                [100 * (row[axis]["mean"] - row[axis]["low"]) for row in own],
                [100 * (row[axis]["high"] - row[axis]["mean"]) for row in own],
            ]
            for axis in centre
        }
        style: dict[str, Any] = {"marker": MARKS[index % 8], "color": COLOURS[index % 8], "label": method}
        style |= {"linestyle": "-" if len(own) > 1 else "none", "elinewidth": 0.8, "markersize": 6, "linewidth": 1.1}
        axes.errorbar(
            centre["perception"], centre["reasoning"], spread["reasoning"], spread["perception"], capsize=0, **style
        )
        for row, x, y in zip(own, centre["perception"], centre["reasoning"], strict=True):
            axes.annotate(
                row["setting"] if len(own) > 1 else "",
                (x, y),
                xytext=(4, 4),
                textcoords="offset points",
                fontsize=6,
                color="#555555",
            )
    axes.set_xlabel("perception, % right")
    axes.set_ylabel("reasoning, % right")
    axes.set_title(title, fontsize=10, loc="left")
    axes.grid(alpha=0.25)
    axes.legend(fontsize=7, loc="lower left")
    figure.savefig(path, dpi=160)
