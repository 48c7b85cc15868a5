"""Where the KL ends that was asked for: the parts of the report on budgets."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from lab_rows import Trio, has_budget


def control(data: dict[str, Any], trios: Sequence[Trio]) -> str:
    """How far learned gates end from their budget, on the control prompts and on fresh ones; few directions apart,
    which may not reach it."""
    lines = []
    for trio in trios:
        rows = [row for row in trio.rows.values() if has_budget(row) and "inject_weight" in row["notes"]]
        rows = [row for row in rows if "rank" not in row["setting"] and "control_kl" in row]
        if not rows:
            continue
        ratios = {
            key: np.array([row[key] / row["setting"]["budget"] for row in rows])
            for key in ("control_kl", "fresh_kl", "kl")
        }
        data.setdefault("control", {})[str(trio.seed)] = {key: value.tolist() for key, value in ratios.items()}
        cells = [
            f"{value.mean():.3f} | {value.min():.3f} to {value.max():.3f} | {int((abs(value - 1) <= 0.1).sum())}"
            for value in ratios.values()
        ]
        lines.append(f"| {trio.seed} | {len(rows)} | {' | '.join(cells)} |")
    if not lines:
        return ""
    head = ["seed", "trainings"]
    for prompts in ("control prompts", "fresh prompts, same hands", "test prompts, other hands"):
        head += [f"KL ÷ budget, {prompts}", "range", "within 10 %"]
    return "\n".join(["## Where a budget ends", "", f"| {' | '.join(head)} |", "|" + "---|" * len(head), *lines])


def landing(data: dict[str, Any], trios: Sequence[Trio]) -> str:
    """Where trainings end that are controlled on many prompts."""
    lines, prompts = [], 0
    for trio in trios:
        for row in (row for row in trio.rows.values() if row["method"] == "landing"):
            budget, notes = row["setting"]["budget"], row["notes"]
            data.setdefault("landing", []).append({"seed": trio.seed, **row["setting"], **notes})
            prompts = notes["prompts"]
            cells = " | ".join(f"{notes[key] / budget:.2f}" for key in ("control_kl", "fresh_kl", "kl"))
            lines.append(f"| {trio.seed}, {row['setting']['inject']}, {budget:g} | {cells} |")
    if not lines:
        return ""
    title = f"## Where a budget ends that is controlled on {prompts:,} prompts\n\nKL ÷ budget on:"
    heads = "seed, injection, budget | control prompts | as many fresh ones, same hands | test prompts, other hands"
    return "\n".join([title, "", f"| {heads} |", "|---|---|---|---|", *lines])


def scatter(data: dict[str, Any], trios: Sequence[Trio]) -> str:
    """How many prompts it takes to know a KL."""
    said = []
    for trio in trios:
        for row in (row for row in trio.rows.values() if row["method"] == "scatter"):
            notes = row["notes"]
            data.setdefault("scatter", []).append({"seed": trio.seed, **row["setting"], **notes})
            said.append(
                f"- seed {trio.seed}, budget {row['setting']['budget']:g}: the standard deviation over prompts is "
                f"{notes['relative_sd']:.1f} times the mean, the worst hundredth of the prompts makes "
                f"{100 * notes['worst_share']:.0f} % of it; a standard error of 10 % takes "
                f"{math.ceil(100 * notes['relative_sd'] ** 2):,} prompts"
            )
    return "\n".join(["## How the KL is spread over prompts (task arithmetic)", "", *said]) if said else ""


def fronts(data: dict[str, Any], trios: Sequence[Trio]) -> str:
    """KL against injected energy, per seed and injection term."""
    lines = []
    for trio in trios:
        for row in trio.rows.values():
            if row["method"] != "front":
                continue
            points = row["notes"]["front"]
            data.setdefault("fronts", []).append(
                {"seed": trio.seed, "inject": row["setting"]["inject"], "points": points}
            )
            cells = [f"{p['fresh_kl'] / p['budget']:.2f} / {100 * p['energy']:.1f} %" for p in points]
            lines.append(f"| {trio.seed}, {row['setting']['inject']} | {' | '.join(cells)} |")
            head = [f"{p['budget']:g}" for p in points]
    if not lines:
        return ""
    title = "## The front in one run\n\nKL on fresh prompts ÷ budget / share of the task vector's energy, by budget:"
    return "\n".join([title, "", f"| seed, injection | {' | '.join(head)} |", "|" + "---|" * (len(head) + 1), *lines])
