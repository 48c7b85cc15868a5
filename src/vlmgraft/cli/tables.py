"""Summaries of analyses as tables for the terminal; `--json` prints the rows themselves."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import typer

WIDTH = 140
"""Of tables that go into a file or a pipe."""


def show_rows(rows: Iterable[Any]) -> None:
    """One JSON document: the list of rows."""
    typer.echo(json.dumps(list(rows), ensure_ascii=False))


def show_table(title: str, columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    """A table with a title; all columns but the first are aligned to the right."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title, title_justify="left", title_style="bold")
    for place, column in enumerate(columns):
        table.add_column(column, justify="right" if place else "left", overflow="fold")
    for row in rows:
        table.add_row(*(said(value) for value in row))
    console = Console()
    (console if console.is_terminal else Console(width=WIDTH)).print(table)


def said(value: Any) -> str:
    """A number in four digits, an estimate in percent with its interval, nothing for None."""
    if value is None:
        return ""
    if isinstance(value, Mapping) and "mean" in value:
        return percent(value)
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def percent(estimate: Mapping[str, float] | None) -> str:
    """Such as "72.7 [69.1, 76.2]"."""
    if estimate is None:
        return ""
    return "{:.1f} [{:.1f}, {:.1f}]".format(*(100 * estimate[key] for key in ("mean", "low", "high")))


def knockout_table(rows: Sequence[Mapping[str, Any]]) -> None:
    """One line per layer and part: what every mode takes from perception and from reasoning, per model."""
    intact = [row for row in rows if row["mode"] == "intact"]
    show_table(
        "intact, % right [95 %]",
        ("model", "reasoning", "perception"),
        [(row["model"], row["reasoning"], row["perception"]) for row in intact],
    )
    cells = [row for row in rows if row["mode"] != "intact"]
    for model in dict.fromkeys(row["model"] for row in cells):
        own = [row for row in cells if row["model"] == model]
        modes = list(dict.fromkeys(row["mode"] for row in own))
        places = list(dict.fromkeys((row["part"], row["layer"]) for row in own))
        found = {(row["part"], row["layer"], row["mode"]): row for row in own}
        body = []
        for part, layer in places:
            changes = [_both(found.get((part, layer, mode))) for mode in modes]
            body.append((f"{part}, layer {layer}", *changes))
        title = f"{model}: change of reasoning / perception, points (`only`: against the VLM)"
        show_table(title, ("block", *modes), body)


def _both(row: Mapping[str, Any] | None) -> str:
    if row is None:
        return ""
    return " / ".join(f"{100 * row[f'{kind}_change']['mean']:+.1f}" for kind in ("reasoning", "perception"))


def sweep_table(rows: Sequence[Mapping[str, Any]]) -> None:
    """One line per point; the Pareto front is marked."""
    show_table(
        "points, % right [95 %]; * on the Pareto front",
        ("method", "setting", "reasoning", "perception", "KL", "front"),
        [
            (row["method"], row["setting"], row["reasoning"], row["perception"], row["kl"], "*" if row["front"] else "")
            for row in rows
        ],
    )


def ranks_table(best: Sequence[Mapping[str, Any]]) -> None:
    """One line per band: where it peaks."""
    show_table(
        "best reasoning of every band of singular directions, % right [95 %]",
        ("band", "share of energy", "λ at the peak", "λ·‖band‖/‖τ‖", "reasoning", "perception"),
        [
            (
                "all" if row["band"] is None else f"{row['band'] + 1} of {row['of']}",
                row["energy"],
                row["scale"],
                row["injected"],
                row["reasoning"],
                row["perception"],
            )
            for row in best
        ],
    )


def distances_table(rows: Sequence[Mapping[str, Any]]) -> None:
    """One line per layer and group."""
    columns = ("layer", "group", "‖W‖", "‖τ‖", "‖τ‖/‖W‖", "‖τ_vlm‖", "cosine", "zeros of τ")
    keys = ("group", "weight_norm", "donor_norm", "ratio", "vlm_norm", "cosine", "unchanged")
    show_table(
        "distances",
        columns,
        [("-" if row["layer"] is None else str(row["layer"]), *(row[key] for key in keys)) for row in rows],
    )


def spectra_table(spectra: Sequence[Any]) -> None:
    """One line per matrix."""
    show_table(
        "spectra of τ",
        ("matrix", "‖τ‖", "effective rank", "stable rank", "first 1", "first 8", "first 64", "of"),
        [
            (one.name, one.norm, one.effective_rank, one.stable_rank, *one.first.values(), min(one.shape))
            for one in spectra
        ],
    )
