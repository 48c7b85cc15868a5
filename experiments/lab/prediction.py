"""Can it be told beforehand whether a merge harms perception? Predictions of a calibration pass against measurements.

    python -m experiments.lab.prediction --trios TRIO-0 TRIO-1 TRIO-2 --rows benchmarks/results/lab/prediction.jsonl \\
        --pretrained experiments/pretrained/results/seed-?-vlm-replay-donor.json

A pair is a trio's VLM with a task vector: its donor's at several lengths, in part of its layers, modules or directions,
and negative controls (singular vectors wrongly paired; the donor of another trio, tuned from another base). Predictors:
without data, ‖τ‖/‖W‖; on 192 prompts of the validation split, the KL at λ = 1, and at a small λ, extrapolated as λ²;
how much nearer the donor's own answers have come. Measured on test questions at λ = 1: the KL, perception and sums. A
merge is safe when perception falls by at most `SLACK`.

Chances are of a logistic regression on the logarithm of the KL, for each trio fitted on the others. Of pretrained
trios, which play no part in it, every merge that was measured on test is read.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from experiments.lab.experiments import Bench, BenchSizes, Job, Row, point_of, truncated
from experiments.pretrained.learned import PRIORS
from experiments.pretrained.results import marks
from vlmgraft.spectral.factors import Factors
from vlmgraft.storage.jsonl import write_text

SIZES = BenchSizes(200, 75, 8, 8, calibration=48, held_out=192, control=192, donor=64, steps=1)
SMALL = (0.1, 0.25)
"""λ of the calibration pass."""
SLACK = 0.02
GAIN = 0.05
"""Sums gained that count as a gain."""
LENGTHS = (0.25, 0.5, 1.0, 2.0, 4.0)
PREDICTORS = {
    "‖τ‖/‖W‖": "ratio",
    "KL at λ 0.1, × 100": "predicted_kl_0.1",
    "KL at λ 0.25, × 16": "predicted_kl_0.25",
    "KL at λ 1": "calibration_kl",
}


def pairs(bench: Bench, other: Mapping[str, Factors]) -> Iterator[tuple[str, float, dict[str, Factors]]]:
    """(kind, length, factors of the task vector); `other`: of another trio's donor."""
    own = dict(bench.comparison.factors)

    def part(*words: str) -> dict[str, Factors]:
        return {name: factor for name, factor in own.items() if any(word in name for word in words)}

    yield from (("donor", length, own) for length in LENGTHS)
    kinds = {
        "wrongly paired": {name: factor.shuffled(0) for name, factor in own.items()},
        "another trio's donor": dict(other),
        "donor, layers 0 and 1": part("layers.0.", "layers.1."),
        "donor, layers 2 and 3": part("layers.2.", "layers.3."),
        "donor, attention": part("self_attn"),
        "donor, mlp": part("mlp"),
        "donor, first direction": truncated(own, 1),
    }
    for kind, factors in kinds.items():
        yield from ((kind, length, factors) for length in (0.5, 1.0, 2.0))


def measured(bench: Bench, factors: Mapping[str, Factors], length: float) -> Row:
    """Predictors and outcomes of one pair at λ = 1."""
    comparison = bench.comparison
    scaled = {name: replace(factor, s=length * factor.s) for name, factor in factors.items()}
    linears = comparison.distiller.linears
    moved = sum(float(factor.s.double().square().sum()) for factor in scaled.values())
    whole = sum(float(linears[name].weight.detach().double().square().sum()) for name in comparison.factors)
    row: Row = {"ratio": (moved / whole) ** 0.5}
    for scale in SMALL:
        weights: dict[str, Tensor] = comparison.task_arithmetic(scale, scaled)
        row[f"predicted_kl_{scale}"] = comparison.controlled.keep_kl(weights) / scale**2
        row[f"nearer_{scale}"] = nearer(bench, weights)
    merged = comparison.task_arithmetic(1.0, scaled)
    row["calibration_kl"] = comparison.controlled.keep_kl(merged)
    return row | bench.measure(merged)


def nearer(bench: Bench, weights: Mapping[str, Tensor]) -> float:
    """By how many nats per token the donor's own answers to text sums are nearer than the VLM leaves them."""
    distiller = bench.comparison.distiller
    return distiller.keep_kl(None, bench.donor) - distiller.keep_kl(weights, bench.donor)


def outcome(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """The pairs' rows with what became of them beside the VLM of their trio: `safe`, `gains`."""
    before = {row["setting"]["trio"]: point_of(row).marks for row in rows if row["method"] == "VLM"}
    found = []
    for row in rows:
        if row["method"] == "VLM":
            continue
        vlm, marks = before[row["setting"]["trio"]], point_of(row).marks
        lost, gained = vlm.perception.mean - marks.perception.mean, marks.reasoning.mean - vlm.reasoning.mean
        found.append(
            {**row, "lost": lost, "gained": gained, "safe": lost <= SLACK + 1e-9, "gains": gained >= GAIN - 1e-9}
        )
    return found


def fitted(kl: np.ndarray, safe: np.ndarray) -> tuple[float, float]:
    """a and b of the log odds a + b ln KL of safety."""
    from sklearn.linear_model import LogisticRegression

    model = LogisticRegression(C=100).fit(np.log(np.maximum(kl, 1e-9))[:, None], safe)
    return float(model.intercept_[0]), float(model.coef_[0, 0])


def chances(curve: tuple[float, float], kl: np.ndarray) -> np.ndarray:
    """Of safety, at these KL."""
    return 1 / (1 + np.exp(-(curve[0] + curve[1] * np.log(np.maximum(kl, 1e-9)))))


def merges_of(rows: Sequence[Row]) -> list[Row]:
    """Every merge of a pretrained trio that was measured on test: its name, KL, and the perception that it lost."""
    on_test = [row for row in rows if row["split"] == "test" and row["method"] not in PRIORS]
    before = next(marks(row["right"]["perception"]).mean() for row in on_test if row["method"] == "VLM")
    return [
        {"name": f"{row['method']}, {row['setting']}", "kl": row["kl"],
         "lost": before - marks(row["right"]["perception"]).mean()}
        for row in sorted(on_test, key=lambda row: float(row["kl"]))
        if row["method"] != "VLM"
    ]  # fmt: skip


def table(rows: Sequence[Row], pretrained: Mapping[int, Sequence[Row]]) -> str:
    """AUROC of every predictor, the calibration of the chances by KL, and what they say of the pretrained trios."""
    from sklearn.metrics import roc_auc_score

    found = outcome(rows)
    safe, trios = np.array([row["safe"] for row in found]), np.array([row["setting"]["trio"] for row in found])
    kl, held = np.array([row["calibration_kl"] for row in found]), np.full(len(found), np.nan)
    lines = [f"{len(found)} pairs of {len(set(trios))} trios; {safe.sum()} are safe.", ""]
    lines += ["| predictor of safety | AUROC | AUROC by trio |", "|---|---|---|"]
    for name, key in PREDICTORS.items():
        values = np.array([row[key] for row in found])
        by = [f"{roc_auc_score(safe[trios == trio], -values[trios == trio]):.2f}" for trio in np.unique(trios)]
        lines.append(f"| {name} | {roc_auc_score(safe, -values):.2f} | {', '.join(by)} |")
    gains, nearer = (np.array([row[key] for row in found]) for key in ("gains", "nearer_0.25"))
    lines += ["", "| predictor of a gain | AUROC |", "|---|---|"]
    lines.append(f"| nearer to the donor's answers at λ 0.25 | {roc_auc_score(gains, nearer):.2f} |")
    for trio in np.unique(trios):
        held[trios == trio] = chances(fitted(kl[trios != trio], safe[trios != trio]), kl[trios == trio])
    lines += ["", "| chance of safety by KL at λ 1, from the other trios | pairs | safe |", "|---|---|---|"]
    lines += _calibration(held, safe)
    curve = fitted(kl, safe)
    lines += ["", f"Of all pairs: log odds of safety {curve[0]:.2f} + {curve[1]:.2f} ln KL."]
    for seed, of_trio in pretrained.items():
        merges = merges_of(of_trio)
        lost, levels = (np.array([merge[key] for merge in merges]) for key in ("lost", "kl"))
        unharmed = lost <= SLACK + 1e-9
        title = f"pretrained trio {seed}: AUROC {roc_auc_score(unharmed, -levels):.2f} of {len(merges)} merges"
        lines += ["", f"| {title} | KL | chance of safety | perception lost, points |", "|---|---|---|---|"]
        for merge, chance in zip(merges, chances(curve, levels), strict=True):
            lines.append(f"| {merge['name']} | {merge['kl']:.4f} | {chance:.2f} | {100 * merge['lost']:.1f} |")
    lines += ["", "| kind, length | KL ÷ that from λ 0.25, by trio | perception lost, points | sums gained |"]
    lines.append("|---|---|---|---|")
    for label in dict.fromkeys(row["method"] for row in found):
        group = [row for row in found if row["method"] == label]
        figures = [
            ", ".join(f"{row['kl'] / max(row['predicted_kl_0.25'], 1e-12):.2g}" for row in group),
            ", ".join(f"{100 * row['lost']:.1f}" for row in group),
            ", ".join(f"{100 * row['gained']:.1f}" for row in group),
        ]
        lines.append(f"| {label} | {' | '.join(figures)} |")
    return "\n".join(lines) + "\n"


def _calibration(chance: np.ndarray, safe: np.ndarray) -> list[str]:
    lines = []
    for low in (0.0, 0.2, 0.4, 0.6, 0.8):
        inside = (chance >= low) & (chance < low + 0.2 + (low == 0.8))
        if inside.any():
            lines.append(f"| {low:.1f} to {low + 0.2:.1f} | {inside.sum()} | {safe[inside].mean():.0%} |")
    return lines


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trios", type=Path, nargs="+", required=True, help="folders of trios, two or more")
    parser.add_argument("--rows", type=Path, required=True, help="`.N.jsonl` for every trio, and the table beside it")
    parser.add_argument("--pretrained", type=Path, nargs="*", default=[], help="results of experiments.pretrained")
    given = parser.parse_args()
    results = [json.loads(path.read_text()) for path in given.pretrained]
    benches = [Bench(trio, SIZES) for trio in given.trios]
    rows = []
    for number, bench in enumerate(benches):
        other = benches[(number + 1) % len(benches)].comparison.factors
        jobs = [Job("VLM", {"trio": number}, lambda bench=bench: bench.measure(None))]
        for kind, length, factors in pairs(bench, other):
            jobs.append(Job(f"{kind}, {length:g}", {"trio": number}, partial(measured, bench, factors, length)))
        rows += bench.run(jobs, given.rows.with_suffix(f".{number}.jsonl"))
    write_text(given.rows.with_suffix(".md"), table(rows, {found["seed"]: found["rows"] for found in results}))


if __name__ == "__main__":
    main()
