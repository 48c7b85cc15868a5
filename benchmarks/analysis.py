"""Tables of what carries what on the lab, from folders that `python -m experiments.lab report` wrote.

    python -m experiments.lab report --out /tmp/report-0
    python -m experiments.lab report --trio /tmp/trio1 --out /tmp/report-1
    python benchmarks/analysis.py 0=/tmp/report-0 1=/tmp/report-1 --out benchmarks/results/analysis

Writes tables.md and, per seed, the rows of knock-outs, bands and sweep without their single items.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vlmgraft.report.parts.layers import KINDS, centre
from vlmgraft.storage.jsonl import read_rows, write_rows, write_text

Row = Mapping[str, Any]
MODES = {
    "mean": "output set to its mean",
    "zero": "weights 0",
    "constant": "weights 1/d_out, as released",
    "restore": "block un-merged",
    "only": "only this block merged, against the VLM",
}


def percent(estimate: Mapping[str, float]) -> str:
    """Such as "72.7 [69.1, 76.2]"."""
    return "{:.1f} [{:.1f}, {:.1f}]".format(*(100 * estimate[key] for key in ("mean", "low", "high")))


def layers(rows: Sequence[Row]) -> list[str]:
    """Change per layer with both blocks of a layer, and each alone."""
    lines = [
        f"Intact {row['model']}: reasoning {percent(row['reasoning'])}, perception {percent(row['perception'])}."
        for row in rows
        if row["mode"] == "intact"
    ]
    depth = 1 + max(row["layer"] for row in rows if row["layer"] is not None)
    lines += ["", "| cell | model | part | " + " | ".join(f"layer {layer}" for layer in range(depth)) + " |"]
    lines.append("|" + "---|" * (3 + depth))
    for mode, said in MODES.items():
        for model in ("VLM", "merged"):
            for part in ("attention", "mlp", "both"):
                own = [row for row in rows if (row["mode"], row["model"], row["part"]) == (mode, model, part)]
                own.sort(key=lambda row: row["layer"])
                if own:
                    cells = [" / ".join(f"{100 * row[f'{kind}_change']['mean']:+.1f}" for kind in KINDS) for row in own]
                    lines.append(f"| {said} | {model} | {part} | {' | '.join(cells)} |")
    lines += ["", "Centre of loss, in layers (both blocks; output set to its mean):", ""]
    lines += [
        f"- {model}: " + ", ".join(f"{kind} {_centre(rows, model, kind)}" for kind in KINDS)
        for model in ("VLM", "merged")
    ]
    return lines


def _centre(rows: Sequence[Row], model: str, kind: str) -> str:
    found = centre([row for row in rows if row["mode"] == "mean"], model, "mean", kind)
    return "none" if found is None else f"{found:.2f}"


def bands(rows: Sequence[Row]) -> list[str]:
    """Every band over λ."""
    scales = sorted({row["scale"] for row in rows if row["scale"]})
    lines = ["| band | " + " | ".join(f"λ {scale:g}" for scale in scales) + " |", "|" + "---|" * (1 + len(scales))]
    for band in dict.fromkeys(row["band"] for row in rows if row["scale"]):
        own = {row["scale"]: row for row in rows if row["band"] == band}
        cells = [" / ".join(f"{100 * own[scale][kind]['mean']:.1f}" for kind in KINDS) for scale in scales]
        lines.append(f"| {'all' if band is None else band + 1} | {' | '.join(cells)} |")
    return lines


def points(rows: Sequence[Row]) -> list[str]:
    """Every point of the sweep."""
    lines = [
        "| method | setting | reasoning | perception | KL | rebuild, s | ask, s |",
        "|---|---|---|---|---|---|---|",
    ]
    return lines + [
        f"| {row['method']} | {row['setting']} | {percent(row['reasoning'])} | {percent(row['perception'])} "
        f"| {row['kl']:.4f} | {row['seconds']['rebuild']:.2f} | {row['seconds']['ask']:.2f} |"
        for row in rows
    ]


def main() -> None:
    """Read the folders, write tables and rows."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("folders", nargs="+", help="seed=folder")
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    lines = ["Change in points of reasoning / perception; accuracies in percent with 95 % bootstrap intervals."]
    parts = (("knockout", layers, "Layers"), ("ranks", bands, "Bands of equal energy"), ("sweep", points, "Sweep"))
    for pair in arguments.folders:
        seed, _, folder = pair.partition("=")
        for name, make, title in parts:
            file = Path(folder) / name / f"{name}.jsonl"
            if not file.is_file():
                continue
            rows = [{key: value for key, value in row.items() if key != "right"} for row in read_rows(file)]
            write_rows(arguments.out / f"{name}-{seed}.jsonl", rows)
            lines += ["", f"## {title}, seed {seed}", "", *make(rows)]
    write_text(arguments.out / "tables.md", "\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
