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
from vlmgraft.lab.exam import draw_exam, save_questions
from vlmgraft.report.charts import Chart, Dot, Heat, Lines, Series, svg_and_pdf
from vlmgraft.report.gate_folder import BINS, read_gates
from vlmgraft.spectral.factor_store import open_store
from vlmgraft.storage.jsonl import read_json, read_rows, write_text

DOCS = Path(__file__).parents[1]
RESULTS = DOCS.parent / "benchmarks" / "results"
PRETRAINED = DOCS.parent / "experiments" / "pretrained" / "results"
PICTURES = DOCS / "pictures"
SIZE = (6.2, 4.2)
MATRICES = {"q_proj": "self_attn.q_proj", "o_proj": "self_attn.o_proj", "up_proj": "mlp.up_proj"}


def main() -> None:
    """Draw everything."""
    rows = [row for row in read_rows(RESULTS / "lab" / "seed-0.jsonl") if row["drawn"]]
    kl, both = "KL from the VLM, nats per token", ("perception, % right", "reasoning, % right")
    write("tradeoff", Lines(tradeoff(rows), *both, x_limits=(80, 100.5), size=SIZE))
    write("kl", Lines(by_kl(rows), kl, "reasoning, % right", log_x=True, size=SIZE))
    write("overshoot", Lines(overshoot(), "λ of task arithmetic", "% right", y_limits=(0, 103), size=SIZE))
    write("bands", Lines(bands(), *both, x_limits=(60, 100), size=SIZE))
    write("pretrained", Lines(pretrained(), "perception, % right", "sums, % right", size=SIZE))
    write("pretrained-kl", Lines(pretrained("kl"), kl, "sums, % right", log_x=True, size=SIZE))
    write("pretrained-where", where())
    with tempfile.TemporaryDirectory() as folder:
        work = learned(Path(folder))
        write(
            "spectrum", Lines(spectrum(work / "factors"), "singular directions, largest first", "% of Σ s²", size=SIZE)
        )
        write("gates", opened(read_gates(work / "gates").matrices))


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


def by_kl(rows: Sequence[Mapping[str, Any]]) -> list[Series]:
    """Reasoning against KL."""
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


def trios() -> dict[str, list[dict[str, Any]]]:
    """Rows of the pretrained trios by name."""
    found = sorted(PRETRAINED.glob("seed-*-vlm-replay-donor.json"))
    return {f"seed {file.name.split('-')[1]}": read_json(file)["rows"] for file in found}


def share(row: Mapping[str, Any], part: str) -> float:
    """Percent of right answers."""
    return 100 * row["right"][part].count("1") / len(row["right"][part])


def pretrained(x: str = "perception") -> list[Series]:
    """Task arithmetic's curve and learned gates at their chosen strength, on the pretrained trios."""
    series = []
    for number, (name, rows) in enumerate(trios().items()):
        on_test = [row for row in rows if row["split"] == "test"]
        for place, method in enumerate(("task arithmetic", "FRISM energy", "FRISM donor")):
            points = [row for row in on_test if row["method"] == method]
            points.sort(key=lambda row: row["kl"])
            dots = tuple(
                Dot(row["kl"] if x == "kl" else share(row, x), share(row, "sums"), row["setting"]) for row in points
            )
            series.append(Series(f"{method}, {name}", dots, style=3 * number + place))
    return series


def where() -> Heat:
    """Task arithmetic in parts of the model, on validation."""
    name, rows = next(iter(trios().items()))
    wanted = ("VLM", "only ", "all but ")
    found = [row for row in rows if row["split"] == "validation" and row["method"].startswith(wanted)]
    values = [[share(row, part) for part in ("sums", "perception")] for row in found]
    names = [row["method"] for row in found]
    return Heat(
        names, ("sums", "perception"), values, x=f"% right, {name}", middle=50, reach=50, unit=" %", written="{:.0f}"
    )


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


def write(name: str, chart: Chart) -> None:
    """The chart as a file of its own: colours and background inside, nothing for the pointer."""
    svg = re.sub(r' (?:tabindex|role|aria-label|data-\w+)="[^"]*"', "", svg_and_pdf(chart, name, name)[0])
    width, height = re.findall(r'viewBox="0 0 ([\d.]+) ([\d.]+)"', svg)[0]
    spaces = 'xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"'
    head = f'<svg {spaces} role="img" width="{width}" '
    paper = f'<rect class="paper" width="{width}" height="{height}"/>'
    svg = svg.replace("<svg ", head, 1).replace(">", f">\n<style>\n{style()}</style>\n{paper}", 1)
    write_text(PICTURES / f"{name}.svg", "\n".join(line for line in svg.splitlines() if line.strip()) + "\n")


def style() -> str:
    """Colours, light and dark, and the rule for cells, from the report's style sheet."""
    sheet = (files("vlmgraft.report") / "page.css").read_text(encoding="utf-8")
    colours = sheet[: sheet.index(':root[data-theme="light"]')]
    rules = "".join(re.findall(r"^(?:svg text|\.cell path) .*\n", sheet, re.M))
    return f"{colours}.paper {{ fill: var(--paper); }}\n{rules}"


if __name__ == "__main__":
    main()
