"""A table's rows as a results file and as Markdown: chosen settings, scores on test, differences at equal KL."""

from __future__ import annotations

import json
import platform
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

from experiments.pretrained.learned import LEARNED, SHUFFLED
from experiments.pretrained.table import METHODS, Table, score
from vlmgraft.evaluation.intervals import bootstrap, score_interval
from vlmgraft.storage.jsonl import read_rows, write_json, write_text

Row = Mapping[str, Any]
CURVE = "task arithmetic"


def marks(text: str) -> np.ndarray:
    """A text of 0 and 1 as numbers."""
    return np.frombuffer(text.encode(), dtype=np.uint8).astype(float) - ord("0")


def at_kl(curve: Sequence[Row], kl: float, part: str) -> np.ndarray:
    """Right answers per item on the curve at a KL, interpolated between its points; its last point beyond them."""
    curve = sorted(curve, key=lambda row: row["kl"])
    levels = [row["kl"] for row in curve]
    place = int(np.clip(np.searchsorted(levels, kl), 1, len(curve) - 1))
    low, high = levels[place - 1 : place + 1]
    share = float(np.clip((kl - low) / (high - low), 0, 1))
    low_marks, high_marks = (marks(curve[at]["right"][part]) for at in (place - 1, place))
    return (1 - share) * low_marks + share * high_marks


def chosen(rows: Sequence[Row]) -> dict[str, Row]:
    """Method → its row on test at the setting that was best on validation."""
    tried: dict[str, list[Row]] = {}
    for row in rows:
        if row["split"] == "validation":
            tried.setdefault(row["method"], []).append(row)
    best = {method: max(points, key=score)["setting"] for method, points in tried.items()}
    on_test = {(row["method"], row["setting"]): row for row in rows if row["split"] == "test"}
    return {method: on_test[method, at] for method, at in best.items() if (method, at) in on_test}


def table(rows: Sequence[Row]) -> str:
    """Methods at their chosen settings, then task arithmetic's curve; percent, 95 % intervals over items."""
    on_test = [row for row in rows if row["split"] == "test"]
    curve = [row for row in on_test if row["method"] in ("VLM", CURVE)]
    beyond = {row["method"]: row for row in rows if row["split"] == "beyond"}
    head = (
        "| method | setting | sums | chain | sums given a chain | perception | KL | sums above the curve | perception "
    )
    head += "above the curve | five numbers | difference | told in text | written in bf16 |"
    lines = [head, "|" + "---|" * (head.count("|") - 1)]
    for method, row in chosen(rows).items():
        figures = _figures(row)
        above = ["", ""]
        if method not in ("VLM", CURVE) and len(curve) > 1 and row["kl"] <= max(point["kl"] for point in curve):
            differences = (marks(row["right"][part]) - at_kl(curve, row["kl"], part) for part in ("sums", "perception"))
            above = [bootstrap([difference]).signed() for difference in differences]
        further = beyond.get(method, {"right": {}})["right"]
        others = [f"{100 * marks(further[part]).mean():.0f}" if part in further else "" for part in BEYOND]
        kept = f"{row['written']:.2f}"
        lines.append(f"| {' | '.join([method, *figures, *above, *others, kept])} |")
    for method, at in (("Task arithmetic", "λ"), (SHUFFLED, "strength")):
        points = [row for row in on_test if row["method"] in (method, method.lower())]
        if points:
            lines += ["", f"{method} at every {at}, on test:", ""]
            lines += [f"| {at} | sums | chain | sums given a chain | perception | KL |", "|---|---|---|---|---|---|"]
        for row in sorted(points, key=lambda row: row["kl"]):
            lines.append(f"| {' | '.join([row['setting'].split()[-1], *_figures(row)[1:]])} |")
    return "\n".join(lines) + "\n"


def where_table(rows: Sequence[Row]) -> str:
    """Task arithmetic in parts, on the validation split."""
    lines = ["| where | λ | sums | chain | perception |", "|---|---|---|---|---|"]
    for row in rows:
        if row["split"] == "validation" and row["method"].startswith(("only ", "all but ", "VLM")):
            right = [f"{100 * marks(row['right'][part]).mean():.0f}" for part in ("sums", "perception")]
            chain = f"{100 * marks(row['chain']['sums']).mean():.0f}"
            lines.append(f"| {row['method']} | {row['setting'][2:]} | {right[0]} | {chain} | {right[1]} |")
    return "\n".join(lines) + "\n"


def spectra_table(rows: Sequence[Row]) -> str:
    """Energy of τ in its first directions."""
    lines = ["| part | ‖τ‖ | first direction | first 16 | first 64 |", "|---|---|---|---|---|"]
    lines += [f"| {r['part']} | {r['norm']:.2f} | {r['1']:.2f} | {r['16']:.2f} | {r['64']:.2f} |" for r in rows]
    return "\n".join(lines) + "\n"


BEYOND = ("plus", "minus", "told")


def _figures(row: Row) -> list[str]:
    right, chain = marks(row["right"]["sums"]), marks(row["chain"]["sums"])
    given = f"{100 * right[chain == 1].mean():.0f}" if chain.any() else ""
    sums, perception = (score_interval([marks(row["right"][part])]).percent() for part in ("sums", "perception"))
    return [row["setting"], sums, f"{100 * chain.mean():.0f}", given, perception, f"{row['kl']:.4f}"]


def command(measured: Table, rows: Sequence[Row]) -> str:
    """What measures these rows, which may have come by several runs."""
    methods = ",".join(dict.fromkeys(row["method"] for row in rows if row["method"] in (*METHODS, *LEARNED)))
    words = ["table", "--root", "R", "--seed", str(measured.trio.seed), "--methods", methods]
    curve = sorted({float(row["setting"][2:]) for row in rows if row["method"] == CURVE and row["split"] == "test"})
    words += ["--curve", ",".join(f"{scale:g}" for scale in curve)]
    words += ["--replay-sums"] * (measured.vlm == "vlm-replay")
    words += ["--kind", measured.donor.removeprefix("donor-")] * (measured.donor != "donor")
    return shlex.join(["python", "-m", "experiments.pretrained", *words])


def publish(measured: Table, folder: Path) -> Path:
    """Write the rows with what they were measured by, and the table, to `folder`."""
    rows = [
        {key: value for key, value in row.items() if key not in ("said", "kl_prompts")}
        for row in read_rows(measured.folder / "rows.jsonl")
    ]
    learned = {path.stem: json.loads(path.read_text()) for path in sorted(measured.folder.glob("learned/*.json"))}
    name = f"seed-{measured.trio.seed}-{measured.vlm}-{measured.donor}"
    made = json.loads((measured.trio.folder / "measured.json").read_text())
    versions = {
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
    }
    shown = command(measured, rows)
    facts = {"command": shown, "seed": measured.trio.seed, "versions": versions, "made": made, "learned": learned}
    write_json(folder / f"{name}.json", {**facts, "rows": rows})
    write_text(folder / f"{name}.md", f"`{shown}`\n\n{table(rows)}")
    if any(row["method"].startswith("only ") for row in rows):
        write_text(folder / f"{name}-where.md", where_table(rows))
    write_text(folder / f"{name}-spectra.md", spectra_table(measured.spectra()))
    return folder / f"{name}.md"
