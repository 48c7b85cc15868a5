"""How well the answer reader agrees with a judge on real outputs: per model and set, and what it does to scores.

    python benchmarks/answers.py real_outputs.jsonl.gz strings.jsonl [--set mathvista] [--dump rest.jsonl]

Rows of the first file: set, run (the model), id, question, choices, answer, precision, output, judge (true or false).
Rows of the second: output, answers, choices, precision, metric, score (0 or 1), why. Neither is part of the project.

Every disagreement was read by a person; `results/answers_reviewed.csv` has the class of each and who errs. All figures
are printed twice: against the judge as it is ("raw"), and with the judge's errors put right by that file ("reviewed");
disagreements that are not in the file are named.
"""

from __future__ import annotations

import argparse
import csv
import gzip
import hashlib
import json
import time
from collections import Counter, defaultdict
from collections.abc import Iterator
from itertools import combinations
from pathlib import Path
from statistics import fmean
from typing import Any

from vlmgraft.evaluation.answers.options import choices_within
from vlmgraft.evaluation.items import Expected
from vlmgraft.evaluation.metrics import METRICS

Row = dict[str, Any]
REVIEWED = Path(__file__).parent / "results" / "answers_reviewed.csv"


def rows_of(path: Path) -> Iterator[Row]:
    opener = gzip.open if path.suffix == ".gz" else open
    with opener(path, "rt", encoding="utf-8") as lines:
        yield from (json.loads(line) for line in lines if line.strip())


def half_of(row: Row) -> int:
    """0 or 1, the same for one question in every run."""
    return hashlib.sha256(f"{row['set']}{row['id']}".encode()).digest()[0] % 2


def verdict(row: Row) -> bool:
    choices = tuple(row["choices"]) or choices_within(row["question"])
    metric = METRICS.get(row["set"], METRICS["auto"])
    return metric(row["output"], Expected((row["answer"],), choices, row["precision"])).score == 1


def reviewed(rows: list[Row]) -> list[Row]:
    """The rows with the judge's errors put right; prints the disagreements by class, model and who errs."""
    with REVIEWED.open(newline="", encoding="utf-8") as lines:
        reviews = {(row["set"], row["model"], row["id"]): row for row in csv.DictReader(lines)}
    classes: Counter[tuple[str, ...]] = Counter()
    corrected = []
    for row in rows:
        review = reviews.get((row["set"], row["run"], str(row["id"])))
        if row["judge"] != row["ours"]:
            who = (review["class"], review["errs"]) if review else (f"not reviewed: {row['id']}", "open")
            classes[(row["set"], row["run"], *who)] += 1
        errs = review is not None and review["errs"] == "judge"
        corrected.append({**row, "judge": review["right"] == "1"} if review and errs else row)
    print("| set | model | class | who errs | n |\n|---|---|---|---|---|")
    for names, count in sorted(classes.items()):
        print(f"| {' | '.join(names)} | {count} |")
    return corrected


def table(rows: list[Row], title: str) -> None:
    """Agreement and shift per set and model, and how far the difference of two models moves at most."""
    print(f"{title}:")
    groups: dict[tuple[str, str], list[Row]] = defaultdict(list)
    for row in rows:
        groups[row["set"], row["run"]].append(row)
    print("| set | model | n | judge | rules | agreement | shift |\n|---|---|---|---|---|---|---|")
    shifts: dict[str, dict[str, float]] = defaultdict(dict)
    for (name, run), members in sorted(groups.items()):
        judge, rules = (100 * fmean(row[key] for row in members) for key in ("judge", "ours"))
        agreement = 100 * fmean(row["judge"] == row["ours"] for row in members)
        shifts[name][run] = rules - judge
        print(
            f"| {name} | {run} | {len(members)} | {judge:.1f} | {rules:.1f} | {agreement:.1f} | {rules - judge:+.2f} |"
        )
    for name, of_run in sorted(shifts.items()):
        moved = max((abs(a - b) for a, b in combinations(of_run.values(), 2)), default=0.0)
        largest = max(map(abs, of_run.values()))
        print(
            f"{name}, {title}: largest shift of a score {largest:.2f}, of a difference of two models {moved:.2f} points"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("outputs", type=Path)
    parser.add_argument("strings", type=Path)
    parser.add_argument("--half", type=int, choices=(0, 1), help="only this half of the questions")
    parser.add_argument("--set", choices=("mathvista", "mathverse", "dynamath"), help="only this set")
    parser.add_argument("--dump", type=Path, help="write the rows where judge and rules disagree, as JSON lines")
    arguments = parser.parse_args()
    rows = [row for row in rows_of(arguments.outputs) if arguments.half in (None, half_of(row))]
    rows = [row for row in rows if arguments.set in (None, row["set"])]
    started = time.process_time()
    for row in rows:
        row["ours"] = verdict(row)
    print(f"{len(rows)} outputs in {time.process_time() - started:.0f} s")
    table(rows, "raw")
    table(reviewed(rows), "reviewed")
    strings = list(rows_of(arguments.strings))
    wrong = []
    for row in strings:
        expected = Expected(tuple(row["answers"]), tuple(row["choices"]), row["precision"])
        if METRICS[row["metric"]](row["output"], expected).score != row["score"]:
            wrong.append(row)
    print(f"{len(strings) - len(wrong)} of {len(strings)} strings as a careful person judges them")
    for row in wrong:
        print(" ", json.dumps(row, ensure_ascii=False)[:300])
    if arguments.dump:
        disagreements = [row for row in rows if row["judge"] != row["ours"]]
        arguments.dump.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in disagreements))


if __name__ == "__main__":
    main()
