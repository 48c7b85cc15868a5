"""The lab's comparison: task arithmetic, linear and FRISM on one trio, chosen on validation, reported on test."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vlmgraft.alignment import Alignment
from vlmgraft.evaluation.intervals import Estimate, bootstrap
from vlmgraft.hf.data import Question
from vlmgraft.hf.models import load_processor, load_text_model, load_vlm
from vlmgraft.lab import world
from vlmgraft.lab.exam import MAX_NEW_TOKENS, Exam, Marks, draw_exam
from vlmgraft.spectral.factors import Factors
from vlmgraft.spectral.gates import Gates
from vlmgraft.training.distill import Distiller
from vlmgraft.training.targets import Targets

SCALES = (0.25, 0.5, 0.75, 1.0, 1.25)
DONOR_SHARES = (0.1, 0.25, 0.5, 0.75)
ENERGY_GRID = ((1.0, 0.1), (1.5, 0.03), (1.5, 0.1), (1.5, 0.3))
DONOR_GRID = ((1.0, 3.0), (1.5, 3.0), (1.5, 10.0))
"""(λ, α) of FRISM with the energy term, and with donor matching."""
PERCEPTION_SLACK = 0.01
"""A setting qualifies when its validation perception is at most a point below the VLM's."""
STEPS, LEARNING_RATE, BATCH_SIZE = 100, 0.1, 48
CALIBRATION, HELD_OUT, DONOR_QUESTIONS = 384, 192, 64

Weights = Gates | Mapping[str, Tensor] | Any
Report = Callable[[str], None]


@dataclass(frozen=True)
class Point:
    """One setting of one method with its marks; `kl` is the drift on held-out image questions in nats per token."""

    method: str
    setting: Mapping[str, float]
    marks: Marks
    kl: float

    @property
    def label(self) -> str:
        """Such as "λ 1, α 0.1"."""
        names = {"scale": "λ", "inject_weight": "α", "donor_share": "donor share"}
        return ", ".join(f"{names.get(key, key)} {value:g}" for key, value in self.setting.items())


@dataclass(frozen=True)
class Choice:
    """A setting chosen on validation; `score` orders choices: (sees well enough, reasoning or else perception)."""

    setting: Mapping[str, float]
    weights: Weights
    score: tuple[bool, float]


@dataclass
class Comparison:
    """Models, factors, exams and cached targets of one run.

    trio: folder with base, vlm, donor. factors: of the donor's task vector, by VLM tensor name. seed: of the exams,
    the calibration questions and the training order; the trio is what it is.
    """

    trio: Path
    alignment: Alignment
    factors: Mapping[str, Factors]
    seed: int = 0
    glyphs: world.Glyphs = "handwriting"
    report: Report = print
    vlm: Any = field(init=False)
    processor: Any = field(init=False)

    def __post_init__(self) -> None:
        self.vlm = load_vlm(self.trio / "vlm", torch.float32).eval()
        self.processor = load_processor(self.trio / "vlm")
        perception: dict[world.Task, int] = dict.fromkeys(world.PERCEPTION, 100)
        self.test = draw_exam(self.seed, "test", {"sum": 400, **dict.fromkeys(perception, 150)}, glyphs=self.glyphs)
        self.validation = draw_exam(self.seed, "validation", {"sum": 200, **perception}, glyphs=self.glyphs)

    @cached_property
    def distiller(self) -> Distiller:
        """Holds the teacher's answers to calibration questions and to the held-out ones (drift is read off those)."""
        held_out = draw_exam(self.seed + 1, "test", dict.fromkeys(world.PERCEPTION, HELD_OUT // 4), glyphs=self.glyphs)
        return Distiller(
            self.vlm,
            self.processor,
            self.factors,
            self.calibration,
            held_out.questions,
            max_new_tokens=MAX_NEW_TOKENS,
            batch_size=BATCH_SIZE,
            seed=self.seed,
        )

    @cached_property
    def calibration(self) -> tuple[Question, ...]:
        """Image questions without labels, of the calibration split."""
        exam = draw_exam(
            self.seed, "calibration", dict.fromkeys(world.PERCEPTION, CALIBRATION // 4), glyphs=self.glyphs
        )
        return tuple(Question(question.question, question.images) for question in exam.questions)

    @cached_property
    def donor_questions(self) -> tuple[Question, ...]:
        """Unlabelled text sums for donor matching."""
        exam = draw_exam(self.seed, "calibration", {"sum": DONOR_QUESTIONS}, as_image=False)
        return tuple(Question(question.question) for question in exam.questions)

    @cached_property
    def donor(self) -> Any:
        """The donor, a text model."""
        return load_text_model(self.trio / "donor", torch.float32).eval()

    @cached_property
    def donor_targets(self) -> Targets:
        """The donor's own answers to the text questions."""
        return self.distiller.donor_targets(self.donor, load_processor(self.trio / "donor"), self.donor_questions)

    def donor_on_text(self) -> Estimate:
        """The donor's accuracy on test sums told in text: what there is to graft."""
        exam = draw_exam(self.seed, "test", {"sum": 400}, as_image=False)
        return exam.mark(self.donor, load_processor(self.trio / "donor")).reasoning

    def mark(self, exam: Exam, weights: Weights) -> Marks:
        """An exam taken by the VLM (None), by gates, by other matrices, or by another model."""
        if weights is None or isinstance(weights, torch.nn.Module):
            return exam.mark(self.vlm if weights is None else weights, self.processor)
        with self.distiller.applied(weights) as model:
            return exam.mark(model, self.processor)

    def point(self, method: str, setting: Mapping[str, float], weights: Weights) -> Point:
        """Test marks and held-out drift of one setting."""
        point = Point(method, setting, self.mark(self.test, weights), self.distiller.keep_kl(weights))
        self.report(
            f"{method}, {point.label or 'as it is'}: reasoning {point.marks.reasoning.percent()}, "
            f"perception {point.marks.perception.percent()}, KL {point.kl:.4f}"
        )
        return point

    def task_arithmetic(self, scale: float, factors: Mapping[str, Factors] | None = None) -> dict[str, Tensor]:
        """W_vlm + λ τ of every projection, from the factors."""
        linears = self.distiller.linears
        chosen = self.factors if factors is None else factors
        return {name: linears[name].weight.data + scale * chosen[name].update() for name in chosen}

    def shuffled(self, scale: float) -> dict[str, Tensor]:
        """The negative control: the same spectrum on shuffled singular vectors."""
        return self.task_arithmetic(scale, {name: factor.shuffled(self.seed) for name, factor in self.factors.items()})

    def gates(self, inject: str, scale: float, weight: float) -> Gates:
        """FRISM's gates with the published energy term, or with donor matching."""
        donor = self.donor_targets if inject == "donor" else None
        settings: dict[str, Any] = {"inject": inject, "inject_weight": weight, "steps": STEPS}
        return self.distiller.learn(scale, donor=donor, learning_rate=LEARNING_RATE, seed=self.seed, **settings)

    def choose(self, candidates: Iterable[tuple[Mapping[str, float], Callable[[], Weights]]], sight: float) -> Choice:
        """The candidate with the best validation reasoning among those whose validation perception is at most
        `PERCEPTION_SLACK` below `sight`; if none qualifies, the one that sees best."""
        scored = []
        for setting, make in candidates:
            weights = make()
            marks = self.mark(self.validation, weights)
            seen, solved = marks.perception.mean, marks.reasoning.mean
            qualifies = seen >= sight - PERCEPTION_SLACK
            scored.append(Choice(setting, weights, (qualifies, solved if qualifies else seen)))
        return max(scored, key=lambda choice: choice.score)


def above_curve(point: Point, curve: Sequence[Point], axis: Callable[[Point], float]) -> Estimate | None:
    """Reasoning of `point` above a baseline curve at the same value of `axis` (its drift, or its perception).

    The two neighbours on the curve are interpolated item by item, and the paired difference is bootstrapped. None when
    the value lies outside the curve.
    """
    ordered = sorted(curve, key=axis)
    at = axis(point)
    for left, right in pairwise(ordered):
        low, high = axis(left), axis(right)
        if low <= at <= high and high > low:
            share = (at - low) / (high - low)
            solved = [np.asarray(each.marks.right["sum"], dtype=float) for each in (left, right, point)]
            return bootstrap([solved[2] - ((1 - share) * solved[0] + share * solved[1])])
    return None
