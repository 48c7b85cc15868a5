"""The sections of a page, each made of the rows of one kind of run."""

from __future__ import annotations

from vlmgraft.report.collect import Collected
from vlmgraft.report.parts.gates import gates
from vlmgraft.report.parts.layers import knockouts, ranks
from vlmgraft.report.parts.outcome import answers, receipts, recipes
from vlmgraft.report.parts.safety import safety, spectra
from vlmgraft.report.parts.tradeoff import best, tradeoff, vlm_row
from vlmgraft.report.svg import escape, number

ALL = (tradeoff, answers, safety, spectra, ranks, gates, knockouts, receipts, recipes)
"""In the order of the page: what it gave, whether it was wise, what carries it, how to do it again."""


def summary(found: Collected) -> str:
    """The figures a reader should take away, as HTML."""
    items: list[tuple[str, str]] = []
    for run in found.points[:1]:
        vlm, top = vlm_row(run.rows), best(run.rows)
        if vlm is not None and top is not None:
            for kind in ("reasoning", "perception"):
                before, after = (100 * row[kind]["mean"] for row in (vlm, top))
                items.append((f"{before:.1f} → {after:.1f} %", f"{kind}, VLM → {top['method']} {top['setting']}"))
    for _, inspection in found.inspections[:1]:
        items.append((inspection["verdict"]["level"], "is merging safe? DRIFT's diagnostic"))
    for gated in found.gates[:1]:
        if gated.settings.get("energy") is not None:
            items.append((f"{number(100 * gated.settings['energy'], 2)} %", "of the task vector's energy injected"))
    entries = "".join(f"<li><b>{escape(value)}</b>{escape(said)}</li>" for value, said in items)
    return f'<ul class="key">{entries}</ul>' if entries else ""
