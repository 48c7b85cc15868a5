"""The table of all rules on all trios, from rows that were measured before.

    python -m experiments.lab.rules_table --lab benchmarks/results/lab/rules-?.jsonl \\
        --pretrained experiments/pretrained/results/seed-?-vlm-replay-donor.json --out benchmarks/results/rules.md

Every cell is a difference from task arithmetic at the same KL, in points of the sums. On the lab's trios it is the mean
over the draws of the calibration questions; its interval is over items, which are the same in all draws, and holds for
all rules together (Bonferroni); then the least and the largest difference of a draw. On the pretrained trios a rule is
compared with task arithmetic's curve, at 95 %.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from experiments.pretrained.learned import PRIORS
from experiments.pretrained.results import CURVE, at_kl, chosen, marks
from vlmgraft.evaluation.intervals import bootstrap
from vlmgraft.storage.jsonl import read_rows, write_text

Row = Mapping[str, Any]
SUM = "reasoning: sum"
REFERENCE, PUBLISHED, OURS = "task_arithmetic", "frism, energy", "frism, donor"
NAMES = {
    "FRISM energy": "frism, energy",
    "FRISM donor": "frism, donor",
    "FRISM shuffled": "frism, gates shuffled",
    "rank one": "rank_1",
    "rank one + 5 % base": "rank_1_interpolated",
    "truncate 16": "truncate",
    "TIES": "ties",
    "DARE": "dare_linear",
    "DARE-TIES": "dare_ties",
    "DELLA": "della",
    "Breadcrumbs": "breadcrumbs",
    "SCE": "sce",
    "Model Stock": "model_stock",
    "SAR": "sar",
    "STAR": "star",
    "IP-Merging": "ip_merging",
}
"""Names of the pretrained table's methods in the lab's."""


Differences = Mapping[str, np.ndarray]
"""Rule → its right answers less those of task arithmetic, [draws, items]."""


def of_lab(rows: Sequence[Row]) -> Differences:
    """On one of the lab's trios, at the same KL; [0, 0] of rules that are over the budget."""
    right: dict[str, list[np.ndarray]] = {}
    for row in sorted(rows, key=lambda row: row["draw"]):
        if row["right"] is not None:
            right.setdefault(row["method"], []).append(marks(row["right"][SUM]))
    reference = np.array(right[REFERENCE])
    over = dict.fromkeys({row["method"] for row in rows} - right.keys(), np.empty((0, 0)))
    return {name: np.array(marked) - reference for name, marked in right.items()} | over


def of_pretrained(rows: Sequence[Row]) -> Differences:
    """On one pretrained trio, from task arithmetic's curve, at the setting chosen on validation; [0, 0] of rules that
    are further from the VLM than the curve goes."""
    curve = [row for row in rows if row["split"] == "test" and row["method"] in ("VLM", CURVE)]
    return {
        NAMES.get(method, method): (marks(row["right"]["sums"]) - at_kl(curve, row["kl"], "sums"))[None]
        if row["kl"] <= max(point["kl"] for point in curve)
        else np.empty((0, 0))
        for method, row in chosen(rows).items()
        if method not in ("VLM", CURVE, *PRIORS)
    }


def cell(draws: np.ndarray, rules: int) -> str:
    """In points: the mean over draws with its interval over items, for so many rules together, and the draws' range."""
    if not draws.size:
        return "over the budget"
    means = 100 * draws.mean(1)
    interval = bootstrap([draws.mean(0)], level=1 - 0.05 / rules).signed()
    return interval if len(means) == 1 else f"{interval} ({means.min():+.1f} … {means.max():+.1f})"


def cells(differences: Differences) -> dict[str, str]:
    """Rule → its cell. Rules of several draws are compared all together, with the VLM as the last one."""
    rules = sum(len(draws) > 1 for draws in differences.values()) - 2
    found = {name: cell(draws, max(1, rules)) for name, draws in differences.items()}
    return found | ({REFERENCE: "0"} if REFERENCE in found else {})


def mean(rows: Sequence[Row], kind: str) -> float:
    """Of a rule's rows, in percent."""
    return 100 * float(np.mean([row[kind]["mean"] for row in rows]))


def table(lab: Mapping[int, Sequence[Row]], pretrained: Mapping[int, Sequence[Row]]) -> str:
    """A row per rule, the best on the lab's trios first, and what task arithmetic has there."""
    trios = {f"lab {seed}": of_lab(rows) for seed, rows in lab.items()}
    trios |= {f"pretrained {seed}": of_pretrained(rows) for seed, rows in pretrained.items()}
    columns = {name: cells(differences) for name, differences in trios.items()}
    of_rule: dict[str, list[Row]] = {}
    for row in (row for rows in lab.values() for row in rows if row["right"] is not None):
        of_rule.setdefault(row["method"], []).append(row)
    names = dict.fromkeys(name for column in columns.values() for name in column)
    order = sorted(names, key=lambda name: -mean(of_rule[name], "reasoning") if name in of_rule else 1)
    head = ["rule", *columns, "perception, lab", "s"]
    lines = [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    for name in order:
        rows, facts = of_rule.get(name, []), ["", ""]
        if rows:
            facts[0] = f"{mean(rows, 'perception'):.1f}"
            facts[1] = f"{np.median([row['seconds'] for row in rows]):.3g}" if name != "VLM" else ""
        lines.append(f"| {' | '.join([name, *(column.get(name, '') for column in columns.values()), *facts])} |")
    reference = [f"lab {seed}: {_level(rows)}" for seed, rows in lab.items()]
    ahead = [
        f"{name}: {cell(rules[OURS] - rules[PUBLISHED], 1)}"
        for name, rules in trios.items()
        if rules.keys() >= {OURS, PUBLISHED}
    ]
    lines += ["", f"Task arithmetic itself, {'; '.join(reference)}."]
    lines += ["", f"Donor matching less the energy term, at 95 %, {'; '.join(ahead)}."] if ahead else []
    return "\n".join(lines) + "\n"


def _level(rows: Sequence[Row]) -> str:
    own = [row for row in rows if row["method"] == REFERENCE]
    strengths = [row["strength"] for row in own]
    return (
        f"{mean(own, 'reasoning'):.1f} % of the sums, perception {mean(own, 'perception'):.1f} % "
        f"(λ {min(strengths):.2f} to {max(strengths):.2f})"
    )


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lab", type=Path, nargs="+", required=True, help="rows of experiments.lab.rules, by trio")
    parser.add_argument("--pretrained", type=Path, nargs="*", default=[], help="results of experiments.pretrained")
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()
    lab = [list(read_rows(path)) for path in given.lab]
    results = [json.loads(path.read_text()) for path in given.pretrained]
    text = table({rows[0]["seed"]: rows for rows in lab}, {found["seed"]: found["rows"] for found in results})
    write_text(given.out, text)


if __name__ == "__main__":
    main()
