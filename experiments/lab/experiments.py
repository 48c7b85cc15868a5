"""Experiments on one trio: every method brought to the same KL, measured, and kept as a row of JSON lines.

A row holds right or wrong per item of the test exam, so that any two rows of one trio can be compared in pairs later.
Budgets are controlled on validation prompts and reported on test prompts. Rows that a file holds already are not made
again: an interrupted experiment goes on where it stopped. The lists of what is measured are in `experiments_jobs.py`.
"""

from __future__ import annotations

import copy
import json
import math
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers.utils.logging import disable_progress_bar

from experiments.lab import tasks
from vlmgraft import pipeline
from vlmgraft.distillation.curvature import FisherDiagonal, estimate_curvature
from vlmgraft.distillation.distill import Distiller
from vlmgraft.distillation.targets import Targets
from vlmgraft.errors import CheckpointError, RecipeError
from vlmgraft.hf.batches import Question
from vlmgraft.hf.models import load_processor
from vlmgraft.lab.compare import LEARNING_RATE, Comparison, Point, Sizes, without_answers
from vlmgraft.lab.exam import Exam, ExamResult, draw_exam
from vlmgraft.methods.frism import fold
from vlmgraft.spectral.factors import Factors
from vlmgraft.spectral.gates import Gates
from vlmgraft.storage.files import scratch_folder
from vlmgraft.storage.jsonl import append_row, read_rows, write_rows


@dataclass(frozen=True)
class BenchSizes(Sizes):
    """The demo's sizes, and how many validation prompts a budget is controlled on."""

    control: int = 192


FULL = BenchSizes(held_out=1152, control=384)
QUICK = BenchSizes(12, 4, 12, 4, calibration=48, held_out=24, control=24, donor=8, steps=3)
MANY = 2048
"""Prompts of a large set: the KL is heavy-tailed, a standard error of 10 % takes about so many."""
SCALE = 1.0
"""λ of every row with gates: the whole task vector is what fully open gates inject."""
TRANSFER_TEXT = ("sum", *tasks.TRANSFER, *tasks.TRANSFER_TEXT)
BISECTIONS = 16

Matrices = dict[str, Tensor]
Row = dict[str, Any]


@dataclass(frozen=True)
class Job:
    """One row to be made: `method` and `setting` name it, `run` gives the rest."""

    method: str
    setting: Mapping[str, Any]
    run: Callable[[], Row]

    @property
    def key(self) -> str:
        """What the row is found by."""
        return _key(self.method, self.setting)


@dataclass
class ControlledComparison(Comparison):
    """A comparison in which a budget is controlled on validation questions, so that no report is made on what was
    aimed at."""

    sizes: BenchSizes = FULL

    @cached_property
    def controlled(self) -> Distiller:
        """The same distiller with other held-out prompts, of the validation split: those a budget is controlled on."""
        twin = copy.copy(self.distiller)
        twin.held_out_targets = self.validation_targets(self.seed + 1)
        return twin

    def validation_targets(self, seed: int, count: int | None = None) -> Targets:
        """The VLM's answers to `count` validation prompts, by default as many as control takes."""
        exam = self.exam(seed, "validation", (count or self.sizes.control) // 4)
        return self.distiller.teacher_targets(without_answers(exam))

    def text_questions(self, task: str) -> tuple[Question, ...]:
        """Unlabelled text questions of one kind."""
        counts = {task: self.sizes.donor}
        return without_answers(draw_exam(self.seed, "calibration", counts, as_image=False, draw=tasks.draw_item))


@dataclass
class Bench:
    """One trio with its factors and everything that is computed once. trio: a folder with base, vlm and donor."""

    trio: Path
    sizes: BenchSizes = FULL
    report: Callable[[str], None] = print
    comparison: ControlledComparison = field(init=False)

    def __post_init__(self) -> None:
        disable_progress_bar()
        notes = self.trio / "training.json"
        if not (self.trio / "vlm").is_dir() or not notes.is_file():
            raise CheckpointError(
                f"{self.trio}: no trio (vlm, training.json); make one with `python -m experiments.lab train`"
            )
        glyphs = json.loads(notes.read_text(encoding="utf-8")).get("glyphs", "handwriting")
        places = {"vlm": str(self.trio / "vlm"), "donor": str(self.trio / "donor")}
        method = {"name": "frism", "inject_weight": 0.1}
        recipe = pipeline.read_recipe({**places, "donor_base": str(self.trio / "base"), "method": method})
        with scratch_folder() as folder:
            store = pipeline.decompose(recipe, folder / "factors")
            factors = {name: store[name] for name in store}
        self.comparison = ControlledComparison(
            self.trio, pipeline.pair(recipe), factors, glyphs=glyphs, report=self.report, sizes=self.sizes
        )

    @cached_property
    def curvature(self) -> FisherDiagonal:
        """h of every direction, from one pass over the calibration questions."""
        return estimate_curvature(self.comparison.distiller)

    @cached_property
    def donor(self) -> Targets:
        """The donor's answers to text sums."""
        return self.comparison.donor_targets

    @cached_property
    def transfer(self) -> tuple[Exam, Exam]:
        """Tasks that are not the tested sum: shown as images, and told in text (with sums for comparison)."""
        count = max(8, self.sizes.sums // 8)
        glyphs = self.comparison.glyphs
        shown = draw_exam(0, "test", dict.fromkeys(tasks.TRANSFER, count), glyphs=glyphs, draw=tasks.draw_item)
        in_text = draw_exam(0, "test", dict.fromkeys(TRANSFER_TEXT, count), as_image=False, draw=tasks.draw_item)
        return shown, in_text

    @cached_property
    def fresh(self) -> Targets:
        """Validation prompts that no budget is controlled on, with the same handwriting as those."""
        return self.comparison.validation_targets(self.comparison.seed + 2)

    @cached_property
    def many(self) -> tuple[Targets, Targets]:
        """Two large sets of validation prompts: one to control on, one to look at afterwards."""
        count = MANY if self.sizes == FULL else self.sizes.control
        seed = self.comparison.seed
        first, second = (self.comparison.validation_targets(seed + by, count) for by in (3, 4))
        return first, second

    def distiller(self, factors: Mapping[str, Factors] | None = None) -> Distiller:
        """The distiller whose budgets are controlled on validation prompts, over all or other (truncated) factors."""
        twin = copy.copy(self.comparison.controlled)
        twin.factors = dict(twin.factors if factors is None else factors)
        return twin

    def learn(self, inject: str, factors: Mapping[str, Factors] | None = None, **settings: Any) -> Gates:
        """Gates at λ = 1 with the energy term or donor matching; `donor` in settings takes other targets."""
        donor = settings.pop("donor", self.donor) if inject == "donor" else None
        settings = {"steps": self.sizes.steps, "learning_rate": LEARNING_RATE, "seed": 0, **settings}
        return self.distiller(factors).learn(SCALE, inject=inject, donor=donor, **settings)

    def matrices(self, gates: Gates, factors: Mapping[str, Factors] | None = None) -> Matrices:
        """W_vlm + λ U diag(σ(g) ⊙ s) Vh of every projection."""
        factors = self.comparison.factors if factors is None else factors
        linears = self.comparison.distiller.linears
        return {n: fold(linears[n].weight.data, f, gates.spectrum(n, f.s)) for n, f in factors.items()}

    def at_budget(self, updates: Mapping[str, Tensor], budget: float) -> tuple[Matrices, dict[str, float]]:
        """W_vlm + λ·update with the λ up to 8 whose KL on the control prompts is the budget (bisection)."""
        linears = self.comparison.distiller.linears
        low, high = math.log(1e-3), math.log(8.0)

        def merged(scale: float) -> Matrices:
            return {name: linears[name].weight.data + scale * update for name, update in updates.items()}

        for _ in range(BISECTIONS):
            middle = (low + high) / 2
            too_far = not self.comparison.controlled.keep_kl(merged(math.exp(middle))) <= budget
            low, high = (low, middle) if too_far else (middle, high)
        return merged(math.exp(low)), {"scale": math.exp(low)}

    def measure(self, weights: Matrices | None, transfer: bool = False, notes: Mapping[str, Any] | None = None) -> Row:
        """The row of these matrices (None: the VLM): right or wrong per item, KL on test and on control prompts."""
        comparison = self.comparison
        row: Row = {"right": _bits(comparison.mark(comparison.test, weights))}
        row["kl"], row["kl_worst_share"] = self._kl(weights)
        row["control_kl"] = comparison.controlled.keep_kl(weights)
        row["fresh_kl"] = comparison.distiller.keep_kl(weights, self.fresh)
        if transfer:
            shown, in_text = (comparison.mark(exam, weights) for exam in self.transfer)
            row |= {"transfer": _bits(shown), "transfer_text": _bits(in_text)}
        return row | {"notes": dict(notes or {})}

    def _kl(self, weights: Matrices | None) -> tuple[float, float]:
        """KL on the test prompts, and the share of it that the worst hundredth of the tokens makes."""
        distiller = self.comparison.distiller
        assert distiller.held_out_targets is not None
        with torch.no_grad(), distiller.applied(weights or {}) as model:
            kl = torch.cat([batch.kl(model) for batch in distiller.held_out_targets.batches]).double()
        worst = kl.topk(max(1, len(kl) // 100)).values.sum() / kl.sum().clamp_min(1e-30)
        return float(kl.mean()), float(worst)

    def scatter(self, weights: Matrices) -> Row:
        """How the KL differs from prompt to prompt: `relative_sd` is the standard deviation over the mean, so that a
        mean over n prompts has a relative standard error of relative_sd / √n."""
        distiller = self.comparison.distiller
        assert distiller.held_out_targets is not None
        prompts = []
        with torch.no_grad(), distiller.applied(weights) as model:
            for batch in distiller.held_out_targets.batches:
                rows = batch.predicts.nonzero()[:, 0]  # every answer token's prompt
                prompts.append(torch.zeros(len(batch.predicts)).index_add(0, rows, batch.kl(model)))
        kl = torch.cat(prompts).double()
        worst = kl.topk(max(1, len(kl) // 100)).values.sum() / kl.sum()
        figures = {"prompts": len(kl), "relative_sd": float(kl.std() / kl.mean()), "worst_share": float(worst)}
        return {"notes": figures}

    def donor_row(self) -> Row:
        """What the donor itself can do, told in text."""
        processor = load_processor(self.trio / "donor")
        return {"transfer_text": _bits(self.transfer[1].mark(self.comparison.donor, processor)), "notes": {}}

    def run(self, jobs: Iterable[Job], path: Path) -> list[Row]:
        """Make the rows that the file `path` does not hold, append each as it is finished, and give all of them.

        Raises RecipeError when the file is of another trio or other sizes.
        """
        about = {"trio": json.loads((self.trio / "training.json").read_text())["seed"], "sizes": asdict(self.sizes)}
        rows = list(read_rows(path)) if path.is_file() else []
        if rows and rows[0]["about"] != about:
            raise RecipeError(f"{path}: holds rows of {rows[0]['about']}, not of {about}; choose another file")
        if rows and not path.read_text(encoding="utf-8").endswith("\n"):
            write_rows(path, rows)  # the last line was cut short
        if not rows:
            path.parent.mkdir(parents=True, exist_ok=True)
            append_row(path, {"about": about, "torch": torch.__version__, "date": time.strftime("%Y-%m-%d")})
        done = {_key(row["method"], row["setting"]): row for row in rows[1:]}
        for job in jobs:
            if job.key not in done:
                started = time.monotonic()
                row = {"method": job.method, "setting": dict(job.setting), **job.run()}
                row["seconds"] = round(time.monotonic() - started, 1)
                append_row(path, row)
                done[job.key] = row
                self.report(_line(row))
        return list(done.values())


def truncated(factors: Mapping[str, Factors], rank: int) -> dict[str, Factors]:
    """The first `rank` directions of every matrix."""
    return {n: replace(f, U=f.U[:, :rank], s=f.s[:rank], Vh=f.Vh[:rank]) for n, f in factors.items()}


def point_of(row: Row) -> Point:
    """A row of the test exam as a point of the comparison."""
    right = {task: np.array([bit == "1" for bit in bits]) for task, bits in row["right"].items()}
    return Point(row["method"], row["setting"], ExamResult(right, ()), row["kl"])


def _bits(marks: ExamResult) -> dict[str, str]:
    return {task: "".join("1" if right else "0" for right in values) for task, values in marks.right.items()}


def _key(method: str, setting: Mapping[str, Any]) -> str:
    return json.dumps([method, dict(setting)], sort_keys=True)


def _line(row: Row) -> str:
    setting = ", ".join(f"{key} {value}" for key, value in row["setting"].items())
    figures = ""
    if "right" in row:
        marks = point_of(row).marks
        figures = f"reasoning {marks.reasoning.percent()}, perception {marks.perception.percent()}, KL {row['kl']:.5f}"
    return f"{row['method']} ({setting}): {figures} [{row['seconds']:.0f} s]"
