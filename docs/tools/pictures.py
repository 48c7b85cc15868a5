"""The pictures of the documentation, drawn by the report's own code: `python docs/tools/pictures.py`, half a minute.

Rows come from benchmarks/results; what is drawn about directions and gates is computed on the embedded trio, with the
recipe of the tutorial. Every picture is one SVG file that follows the reader's light or dark setting, with its own
background.
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

from vlmgraft import pipeline
from vlmgraft.lab import trio_path, world
from vlmgraft.lab.exam import draw_exam
from vlmgraft.lab.tour import save_questions
from vlmgraft.records import read_rows, write_text
from vlmgraft.report.charts import MARKS, SERIES, Axes, Dot, Heat, Series, heat_map, line_chart, mark
from vlmgraft.report.collect import BINS, read_gates
from vlmgraft.report.svg import label
from vlmgraft.spectral.donors import open_store

DOCS = Path(__file__).parents[1]
RESULTS = DOCS.parent / "benchmarks" / "results"
PICTURES = DOCS / "pictures"
MATRICES = {"q_proj": "self_attn.q_proj", "o_proj": "self_attn.o_proj", "up_proj": "mlp.up_proj"}


def main() -> None:
    """Draw everything."""
    rows = [row for row in read_rows(RESULTS / "lab" / "seed-0.jsonl") if row["drawn"]]
    lines("tradeoff", tradeoff(rows), Axes("perception, % right", "reasoning, % right", x_limits=(80, 100.5)))
    lines("drift", by_drift(rows), Axes("KL from the VLM, nats per token", "reasoning, % right", log_x=True))
    lines("overshoot", overshoot(), Axes("λ of task arithmetic", "% right", y_limits=(0, 103)))
    lines("bands", bands(), Axes("perception, % right", "reasoning, % right", x_limits=(60, 100)))
    with tempfile.TemporaryDirectory() as folder:
        work = learned(Path(folder))
        lines("spectrum", spectrum(work / "factors"), Axes("singular directions, largest first", "% of Σ s²"))
        run = read_gates(work / "gates")
        write("gates", heat_map("gates by layer and rank", opened(run.matrices), 560), 560)


def tradeoff(rows: Sequence[Mapping[str, Any]]) -> list[Series]:
    """Reasoning against perception, a series per method."""
    return [
        Series(
            method,
            tuple(
                Dot(
                    100 * row["perception"]["mean"],
                    100 * row["reasoning"]["mean"],
                    row["setting"],
                    y_range=percent(row["reasoning"]),
                )
                for row in rows
                if row["method"] == method
            ),
        )
        for method in dict.fromkeys(row["method"] for row in rows)
    ]


def by_drift(rows: Sequence[Mapping[str, Any]]) -> list[Series]:
    """Reasoning against drift."""
    return [
        Series(
            method,
            tuple(
                Dot(row["kl"], 100 * row["reasoning"]["mean"], row["setting"], y_range=percent(row["reasoning"]))
                for row in rows
                if row["method"] == method
            ),
        )
        for method in dict.fromkeys(row["method"] for row in rows if row["kl"] > 0)
    ]


def overshoot() -> list[Series]:
    """What λ does to both, on the three trios."""
    found = []
    for seed in (0, 1, 2):
        rows = [row for row in read_rows(RESULTS / "lab" / f"seed-{seed}.jsonl") if row["drawn"]]
        rows = [row for row in rows if row["method"] in ("VLM", "task arithmetic")]
        for kind in ("reasoning", "perception"):
            dots = tuple(Dot(row["order"], 100 * row[kind]["mean"], row["setting"]) for row in rows)
            found.append(Series(f"{kind}, seed {seed}", dots))
    return found


def bands() -> list[Series]:
    """Quarters of the task vector's energy, one at a time, over λ."""
    rows = [row for row in read_rows(RESULTS / "analysis" / "ranks-0.jsonl") if row.get("scale")]
    names = {None: "all directions"} | {place: f"quarter {place + 1} of the energy" for place in range(4)}
    return [
        Series(
            name,
            tuple(
                Dot(100 * row["perception"]["mean"], 100 * row["reasoning"]["mean"], f"λ {row['scale']}")
                for row in rows
                if row["band"] == band and row["perception"]["mean"] >= 0.6
            ),
        )
        for band, name in names.items()
    ]


def learned(folder: Path) -> Path:
    """The tutorial's FRISM merge: its work directory."""
    save_questions(draw_exam(0, "calibration", dict.fromkeys(world.PERCEPTION, 48)).questions, folder / "q.jsonl")
    calibration = {"data": str(folder / "q.jsonl"), "samples": 64, "held_out": 128, "max_new_tokens": 28}
    method = {"name": "frism", "kl_budget": 0.003, "steps": 100, "learning_rate": 0.1}
    places = {key: str(trio_path() / name) for key, name in (("vlm",) * 2, ("donor",) * 2, ("donor_base", "base"))}
    recipe = {**places, "method": {**method, "calibration": {**calibration, "batch_size": 32}}}
    pipeline.merge(recipe, folder / "merged", workdir=folder / "work")
    return folder / "work"


def spectrum(factors: Path) -> list[Series]:
    """How fast the energy of a task vector adds up over its directions."""
    store, found = open_store(factors), []
    for said, part in MATRICES.items():
        name = next(name for name in store if ".2." in name and part in name)
        share = 100 * store[name].s.double().square().cumsum(0) / store[name].s.double().square().sum()
        places = [place for place in (0, 1, 3, 7, 15, 31, 63, 95, 127) if place < len(share)]
        found.append(Series(f"{said}, layer 2", tuple(Dot(place + 1, float(share[place]), "") for place in places)))
    return found


def opened(matrices: Sequence[Mapping[str, Any]]) -> Heat:
    """Mean opening of gates by layer and rank."""
    layers = sorted({row["layer"] for row in matrices})
    values = [
        [
            sum(row["by_rank"][bin_] for row in matrices if row["layer"] == layer)
            / sum(row["layer"] == layer for row in matrices)
            for bin_ in range(BINS)
        ]
        for layer in layers
    ]
    names = [str(layer) for layer in layers]
    columns = [str(place + 1) for place in range(BINS)]
    axis = f"{BINS}ths of the singular directions, the largest first"
    return Heat(names, columns, values, axis, "layer", 0.5, 0.5, written=None)


def percent(estimate: Mapping[str, float]) -> tuple[float, float]:
    """The ends of an interval."""
    return 100 * estimate["low"], 100 * estimate["high"]


def lines(name: str, series: Sequence[Series], axes: Axes, width: int = 560, tall: int = 340) -> None:
    """A chart of lines with its legend below."""
    write(name, line_chart(name, series, axes, width, tall), width, series)


def write(name: str, chart: str, width: int, series: Sequence[Series] = ()) -> None:
    """The chart as a file of its own: colours, background and legend inside."""
    height = int(float(re.findall(r'viewBox="0 0 \d+ (\d+)', chart)[0]))
    columns = 2 if len(series) > 1 else 1
    made = []
    for place, one in enumerate(series):
        x, y = 62 + (place % columns) * (width - 62) / columns, height + 14 + (place // columns) * 18
        shape = mark(MARKS[place % len(MARKS)], x, y - 4, one.name).replace(' tabindex="0"', "")
        made.append(f'<g class="series s{place % SERIES}">{shape}</g>' + label(x + 12, y, one.name))
    total = height + (18 * -(-len(series) // columns) + 8 if series else 0)
    inside = re.sub(r"^<svg[^>]*>|</svg>$", "", chart).replace(' tabindex="0"', "")
    inside = re.sub(r' data-tip="[^"]*"', "", inside)
    box = f'xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {total}" width="{width}" height="{total}"'
    paper = f'<rect class="paper" width="{width}" height="{total}"/>'
    svg = f'<svg {box} role="img">\n<style>\n{style()}</style>\n{paper}{inside}{"".join(made)}</svg>\n'
    write_text(PICTURES / f"{name}.svg", svg.replace("><", ">\n<"))


def style() -> str:
    """Colours and the rules for charts, from the report's style sheet."""
    sheet = (files("vlmgraft.report") / "page.css").read_text(encoding="utf-8")
    colours = sheet[: sheet.index(':root[data-theme="light"]')]
    chart = sheet[sheet.index("svg text") : sheet.index("[data-tip]:hover")]
    return f"{colours}text {{ font-family: system-ui, sans-serif; }}\n.paper {{ fill: var(--paper); }}\n{chart}"


if __name__ == "__main__":
    main()
