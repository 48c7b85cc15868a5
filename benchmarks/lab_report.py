"""variants.md and variants.json from the rows of `lab_variants.py`: tables over base seeds, paired by item."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from lab_budgets import control, fronts, landing, scatter
from lab_rows import ARITHMETIC, Items, Row, Trio, has_budget, over_seeds, read_trio, signed

from experiments.lab.experiments import point_of
from experiments.lab.experiments_jobs import DONOR_WEIGHTS, ENERGY_WEIGHTS, KINDS, RANKS, SPECTRA, TRANSFERRED
from vlmgraft.evaluation.intervals import bootstrap
from vlmgraft.storage.jsonl import write_json, write_text

_, ENERGY, DONOR = TRANSFERRED
TABLE = (
    ARITHMETIC,
    ENERGY,
    DONOR,
    "curvature, hard gates",
    "curvature, soft gates",
    "curvature start, energy",
    "curvature start, donor matching",
    "one gate per matrix, energy",
    "one gate per matrix, donor matching",
    "one gate per layer, energy",
    "one gate per layer, donor matching",
    "all weights, donor matching",
)
PAIRS = (
    (DONOR, ENERGY),
    (ENERGY, "curvature, soft gates"),
    (DONOR, "curvature, soft gates"),
    ("curvature, soft gates", "curvature, hard gates"),
    ("curvature start, energy", ENERGY),
    ("curvature start, donor matching", DONOR),
    (ENERGY, "one gate per matrix, energy"),
    (DONOR, "one gate per matrix, donor matching"),
    (ENERGY, "one gate per layer, energy"),
    (DONOR, "one gate per layer, donor matching"),
    (DONOR, "all weights, donor matching"),
)


def write_report(folder: Path) -> None:
    """variants.md and variants.json in `folder`, from its variants-*.jsonl."""
    trios = [read_trio(file) for file in sorted(folder.glob("variants-*.jsonl"))]
    if not trios:
        raise SystemExit(f"{folder}: no variants-*.jsonl; run `python benchmarks/lab_variants.py all --out …` first")
    budgets = sorted({row["setting"]["budget"] for trio in trios for row in trio.rows.values() if has_budget(row)})
    data: dict[str, Any] = {"heads": [trio.head for trio in trios]}
    parts = [_heading(trios)]
    for budget in budgets:
        at: dict[str, Any] = {"budget": budget}
        rows = [("VLM", "VLM", {}), ("FRISM (α 0.1)", "FRISM (energy)", {"inject_weight": 0.1})]
        rows += [(name, name, at) for name in TABLE]
        parts.append(_section(data, trios, f"Every method at {budget:g} nats per token", rows))
        parts.append(_pairs(data, trios, budget))
    for budget in budgets:
        kinds = [(f"{DONOR}, questions: {kind}", DONOR, _kind(kind, budget)) for kind in KINDS]
        kinds = [(ENERGY, ENERGY, {"budget": budget}), *kinds]
        parts.append(_section(data, trios, f"Questions of other kinds at {budget:g}", kinds))
        parts.append(_transfer(data, trios, budget))
        ranks = [(f"{m}, rank {k}", m, _rank(k, budget)) for m in (ENERGY, DONOR) for k in (*RANKS, "full")]
        parts.append(_section(data, trios, f"Number of directions at {budget:g}", ranks))
        rules = [(name, name, {"budget": budget}) for name in (ARITHMETIC, *SPECTRA)]
        parts.append(_section(data, trios, f"Other spectra at {budget:g}", rules))
    weights = [(f"FRISM (energy), α {w:g}", "FRISM (energy)", {"inject_weight": w}) for w in ENERGY_WEIGHTS]
    weights += [(f"{DONOR}, α {w:g}", DONOR, {"inject_weight": w}) for w in DONOR_WEIGHTS]
    parts.append(_section(data, trios, "Weight of the injection term", weights))
    parts += [control(data, trios), landing(data, trios), scatter(data, trios), fronts(data, trios)]
    write_text(folder / "variants.md", "\n\n".join(part for part in parts if part) + "\n")
    write_json(folder / "variants.json", data)


def _kind(kind: str, budget: float) -> dict[str, Any]:
    return {"budget": budget} | ({} if kind == "sum" else {"questions": kind})


def _rank(rank: int | str, budget: float) -> dict[str, Any]:
    return {"budget": budget} | ({} if rank == "full" else {"rank": rank})


def _heading(trios: Sequence[Trio]) -> str:
    sizes, seeds = trios[0].head["about"]["sizes"], ", ".join(str(trio.seed) for trio in trios)
    dates = sorted({trio.head["date"] for trio in trios})
    return (
        "# The lab's variants\n\n"
        f"Base seeds {seeds}; exam and training seed 0; {' to '.join(dict.fromkeys((dates[0], dates[-1])))}, torch "
        f"{trios[0].head['torch']}, one core. Rows: `variants-SEED.jsonl`, made by `python benchmarks/lab_variants.py "
        "all --trio T --out variants-SEED.jsonl` (T of seeds 1 and 2: `python -m experiments.lab train --seed "
        "SEED --out T`), this page by `python benchmarks/lab_variants.py report --out benchmarks/results/lab`.\n\n"
        f"Test split: {sizes['sums']} sums, {sizes['perception']} questions per perception task; {sizes['steps']} "
        f"training steps; λ 1. A cell is reasoning / perception / KL (reasoning above task arithmetic at the same "
        "KL, paired by item). Budgets are controlled on "
        f"{sizes['control']} validation prompts, the KL shown is that on {sizes['held_out']} test prompts, in nats "
        "per token. Mean over seeds: first interval, 95 % bootstrap over items (these trios); second, Student's t over "
        "the seeds (other trios)."
    )


def _section(
    data: dict[str, Any], trios: Sequence[Trio], title: str, rows: Iterable[tuple[str, str, Mapping[str, Any]]]
) -> str:
    """One table: label, method and setting per row; a column per seed and the mean. Empty when no row is measured."""
    lines, found = [], []
    for label, method, setting in rows:
        measured = [trio.row(method, **setting) for trio in trios]
        if not any(measured):
            continue
        cells = [_cell(trio, row) for trio, row in zip(trios, measured, strict=True)]
        above = [_residual(trio, row) for trio, row in zip(trios, measured, strict=True)]
        mean = "" if label in ("VLM", ARITHMETIC) else over_seeds(above)[0]
        lines.append(f"| {label} | {' | '.join(cells)} | {mean} |")
        figures = {str(t.seed): _figures(t, row) for t, row in zip(trios, measured, strict=True) if row}
        found.append({"row": label, "setting": dict(setting), "seeds": figures, "above": over_seeds(above)[1]})
    if not lines:
        return ""
    data[title] = found
    head = ["method", *(f"seed {trio.seed}" for trio in trios), "above task arithmetic, mean over seeds"]
    return "\n".join([f"## {title}", "", f"| {' | '.join(head)} |", "|" + "---|" * len(head), *lines])


def _residual(trio: Trio, row: Row | None) -> Items | None:
    return None if row is None else trio.above(row)


def _figures(trio: Trio, row: Row) -> dict[str, Any]:
    marks, above = point_of(row).marks, trio.above(row)
    return {
        "reasoning": asdict(marks.reasoning),
        "perception": asdict(marks.perception),
        "kl": row["kl"],
        "control_kl": row["control_kl"],
        "above": None if above is None else asdict(bootstrap([above])),
        "notes": row["notes"],
    }


def _cell(trio: Trio, row: Row | None) -> str:
    if row is None:
        return ""
    marks, above = point_of(row).marks, trio.above(row)
    shown = f"{100 * marks.reasoning.mean:.1f} / {100 * marks.perception.mean:.1f} / {row['kl']:.4f}"
    if row["method"] in ("VLM", ARITHMETIC):
        return shown
    return f"{shown} ({'outside' if above is None else signed(bootstrap([above]))})"


def _pairs(data: dict[str, Any], trios: Sequence[Trio], budget: float) -> str:
    """Differences between methods at one budget, each taken above task arithmetic at its own KL, paired by item."""
    lines, found = [], []
    for first, second in PAIRS:
        differences: list[Items | None] = []
        for trio in trios:
            both = [_residual(trio, trio.row(name, budget=budget)) for name in (first, second)]
            differences.append(None if both[0] is None or both[1] is None else both[0] - both[1])
        if all(difference is None for difference in differences):
            continue
        cells = ["" if each is None else signed(bootstrap([each])) for each in differences]
        text, figures = over_seeds(differences)
        lines.append(f"| {first} − {second} | {' | '.join(cells)} | {text} |")
        found.append({"first": first, "second": second, "difference": figures})
    if not lines:
        return ""
    data[f"pairs at {budget:g}"] = found
    head = ["difference in reasoning", *(f"seed {trio.seed}" for trio in trios), "mean over seeds"]
    return "\n".join([f"| {' | '.join(head)} |", "|" + "---|" * len(head), *lines])


def _transfer(data: dict[str, Any], trios: Sequence[Trio], budget: float) -> str:
    """Tasks beside the sum: the donor told in text, and every model on images and in text."""
    rows: list[tuple[str, str, Mapping[str, Any]]] = [("donor", "donor, told in text", {}), ("VLM", "VLM", {})]
    rows += [(name, name, {"budget": budget}) for name in TRANSFERRED]
    rows += [(f"{DONOR}, questions: {kind}", DONOR, _kind(kind, budget)) for kind in KINDS[1:]]
    parts = []
    for key, title in (("transfer_text", "told in text"), ("transfer", "as images")):
        measured = [(label, [trio.row(method, **setting) or {} for trio in trios]) for label, method, setting in rows]
        measured = [(label, found) for label, found in measured if any(key in row for row in found)]
        if not measured:
            continue
        tasks = list(next(row[key] for _, found in measured for row in found if key in row))
        data[f"transfer at {budget:g}, {title}"] = {
            label: [{t: _share(row, key, t) for t in tasks} if key in row else None for row in found]
            for label, found in measured
        }
        head = [f"% right, {title}, per seed", *(task.replace("_", " ") for task in tasks)]
        lines = [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
        for label, found in measured:
            cells = [" / ".join(f"{_share(row, key, t):.0f}" for row in found if key in row) for t in tasks]
            lines.append(f"| {label} | {' | '.join(cells)} |")
        parts.append("\n".join(lines))
    return "\n\n".join(parts)


def _share(row: Row, key: str, task: str) -> float:
    bits = row[key][task]
    return 100 * bits.count("1") / len(bits)
