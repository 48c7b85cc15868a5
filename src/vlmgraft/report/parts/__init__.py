"""The sections of a page, one function for each kind of run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from vlmgraft.report.collect import Collected
from vlmgraft.report.parts.gates import gates
from vlmgraft.report.parts.layers import bands, knockout
from vlmgraft.report.parts.outcome import answers, receipt, recipes
from vlmgraft.report.parts.safety import distances, spectra
from vlmgraft.report.parts.tradeoff import best, method_styles, tradeoff, vlm_row
from vlmgraft.report.sections import Section
from vlmgraft.report.text import escape, number


def sections(runs: Collected) -> list[Section]:
    """Sections in page order: points, answers, distances, spectra, bands, gates, knock-outs, receipts, recipes.

    From the second run of a kind on, the id gets a number and the topic the run's folder.
    """
    styles, inspections = method_styles([row for run in runs.points for row in run.rows]), dict(runs.inspections)
    kinds: list[tuple[list[Any], Callable[[Any], Section]]] = [
        (runs.points, lambda run: tradeoff(run, styles)),
        (runs.answers, answers),
        (runs.distances, lambda run: distances(run, inspections.get(run.folder, {}))),
        (runs.spectra, spectra),
        (runs.ranks, bands),
        (runs.gates, gates),
        (runs.knockouts, knockout),
        (runs.receipts, receipt),
    ]
    made = []
    for found, make in kinds:
        for index, run in enumerate(found):
            section = make(run)
            if index:
                topic = f"{section.topic}, {run.folder.name}"
                section = replace(section, id=f"{section.id}-{index}", topic=topic)
            made.append(section)
    return [*made, *recipes(runs.recipes)]


def summary(runs: Collected) -> str:
    """The headline as HTML: the first run's best point against the VLM; without points, the distance of the pair."""
    items: list[tuple[str, str]] = []
    for run in runs.points[:1]:
        vlm, top = vlm_row(run.rows), best(run.rows)
        if vlm is not None and top is not None:
            name = f"{top['method']} {top['setting']}".strip()
            for kind in ("reasoning", "perception"):
                before, after = (100 * row[kind]["mean"] for row in (vlm, top))
                items.append((f"{before:.1f} → {after:.1f} %", f"{kind}, VLM → {name}"))
            if top.get("kl") is not None:
                items.append((number(top["kl"]), f"nats per token, KL of {name} from the VLM"))
    for _, inspection in runs.inspections[: 0 if items else 1]:
        if extent := inspection.get("extent"):
            items.append((f"{100 * extent['median_ratio']:.1f} %", "‖τ‖ / ‖W‖, median of layers and modules"))
    entries = "".join(f"<li><b>{escape(value)}</b>{escape(text)}</li>" for value, text in items)
    return f'<ul class="key">{entries}</ul>' if entries else ""
