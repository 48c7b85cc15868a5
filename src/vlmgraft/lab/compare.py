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
from jaxtyping import Float
from torch import Tensor

from vlmgraft.alignment import Alignment
from vlmgraft.distillation.distill import Distiller
from vlmgraft.distillation.targets import Targets
from vlmgraft.evaluation.intervals import Estimate, bootstrap
from vlmgraft.hf.batches import Question
from vlmgraft.hf.models import load_processor, load_text_model, load_vlm
from vlmgraft.lab import world
from vlmgraft.lab.exam import MAX_NEW_TOKENS, Exam, ExamResult, draw_exam
from vlmgraft.spectral.factors import Factors
from vlmgraft.spectral.gates import Gates
from vlmgraft.storage.progress import Progress

PERCEPTION_SLACK = 0.01
"""A setting qualifies when its validation perception is at most a point below the VLM's."""
LEARNING_RATE, BATCH_SIZE = 0.1, 48


@dataclass(frozen=True)
class Sizes:
    """Numbers of questions: test and validation exams (perception: per task), image questions for learning gates
    (calibration) and for measuring the KL (held_out), text questions for the donor. steps: training steps."""

    sums: int = 400
    perception: int = 150
    validation_sums: int = 200
    validation_perception: int = 100
    calibration: int = 384
    held_out: int = 192
    donor: int = 64
    steps: int = 100


Weights = Gates | Mapping[str, Tensor] | Any
Report = Callable[[str], None]
Items = Float[np.ndarray, " items"]


@dataclass(frozen=True)
class Point:
    """One setting of one method with its marks; `kl` is the KL on held-out image questions in nats per token."""

    method: str
    setting: Mapping[str, float]
    marks: ExamResult
    kl: float

    @property
    def label(self) -> str:
        """The setting as a text, such as "λ 1, α 0.1"."""
        names = {"scale": "λ", "inject_weight": "α", "donor_share": "donor share"}
        return ", ".join(f"{names.get(key, key)} {value:g}" for key, value in self.setting.items())


@dataclass(frozen=True)
class ChosenSetting:
    """A setting tried on validation. `score` ranks settings: (perception suffices, then reasoning, else perception)."""

    setting: Mapping[str, float]
    weights: Weights
    score: tuple[bool, float]


@dataclass
class Comparison:
    """Models, factors, exams and cached targets of one run.

    trio: folder with base, vlm, donor. factors: of the donor's task vector, by VLM tensor name. seed: of the exams,
    the calibration questions and the training order, not of the trio. The KL is reported on test questions.
    """

    trio: Path
    alignment: Alignment
    factors: Mapping[str, Factors]
    seed: int = 0
    glyphs: world.Glyphs = "handwriting"
    report: Report = print
    sizes: Sizes = field(default_factory=Sizes)
    progress: Progress | None = None
    vlm: Any = field(init=False)
    processor: Any = field(init=False)

    def __post_init__(self) -> None:
        self.vlm = load_vlm(self.trio / "vlm", torch.float32).eval()
        self.processor = load_processor(self.trio / "vlm")
        self.test = self.exam(self.seed, "test", self.sizes.perception, self.sizes.sums)
        self.validation = self.exam(
            self.seed, "validation", self.sizes.validation_perception, self.sizes.validation_sums
        )

    def exam(self, seed: int, split: world.Split, perception: int, sums: int = 0) -> Exam:
        """`perception` questions per task, and sums, with images of the trio's own glyphs."""
        counts = {"sum": sums} if sums else {}
        counts.update(dict.fromkeys(world.PERCEPTION, perception))
        return draw_exam(seed, split, counts, glyphs=self.glyphs)

    @cached_property
    def distiller(self) -> Distiller:
        """Holds the teacher's answers to the calibration questions, and to held-out questions for measuring the KL."""
        held_out = self.exam(self.seed + 1, "test", self.sizes.held_out // 4)
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
        return without_answers(self.exam(self.seed, "calibration", self.sizes.calibration // 4))

    @cached_property
    def donor_questions(self) -> tuple[Question, ...]:
        """Unlabelled text sums for donor matching."""
        return without_answers(draw_exam(self.seed, "calibration", {"sum": self.sizes.donor}, as_image=False))

    @cached_property
    def donor(self) -> Any:
        """The donor, a text model."""
        return load_text_model(self.trio / "donor", torch.float32).eval()

    @cached_property
    def donor_targets(self) -> Targets:
        """The donor's own answers to the text sums."""
        return self.distiller.donor_targets(self.donor, load_processor(self.trio / "donor"), self.donor_questions)

    def donor_on_text(self) -> Estimate:
        """The donor's accuracy on test sums told in text: the ability to be grafted."""
        exam = draw_exam(self.seed, "test", {"sum": self.sizes.sums}, as_image=False)
        return exam.mark(self.donor, load_processor(self.trio / "donor")).reasoning

    def mark(self, exam: Exam, weights: Weights) -> ExamResult:
        """The result of an exam. weights: None for the VLM, gates, other matrices, or another model."""
        if weights is None or isinstance(weights, torch.nn.Module):
            return exam.mark(self.vlm if weights is None else weights, self.processor)
        with self.distiller.applied(weights) as model:
            return exam.mark(model, self.processor)

    def point(self, method: str, setting: Mapping[str, float], weights: Weights) -> Point:
        """Test marks and held-out KL of one setting."""
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
        settings: dict[str, Any] = {"inject": inject, "inject_weight": weight, "steps": self.sizes.steps}
        return self.distiller.learn(scale, donor=donor, learning_rate=LEARNING_RATE, seed=self.seed, **settings)

    def choose(
        self,
        method: str,
        candidates: Iterable[tuple[Mapping[str, float], Callable[[], Weights]]],
        vlm_perception: float,
    ) -> ChosenSetting:
        """The candidate with the best validation reasoning among those whose validation perception is at most
        `PERCEPTION_SLACK` below `vlm_perception`; if none qualifies, the one with the best perception."""
        scored, candidates = list[ChosenSetting](), list(candidates)
        for setting, make in candidates:
            if self.progress:
                self.progress(len(scored), len(candidates), f"{method}, settings tried on validation")
            weights = make()
            marks = self.mark(self.validation, weights)
            seen, solved = marks.perception.mean, marks.reasoning.mean
            qualifies = seen >= vlm_perception - PERCEPTION_SLACK
            scored.append(ChosenSetting(setting, weights, (qualifies, solved if qualifies else seen)))
        return max(scored, key=lambda choice: choice.score)


def without_answers(exam: Exam) -> tuple[Question, ...]:
    """The exam's questions without their answers."""
    return tuple(Question(question.question, question.images) for question in exam.questions)


def above_items(point: Point, curve: Sequence[Point], axis: Callable[[Point], float]) -> Items | None:
    """For every sum of the exam, `point` minus a baseline curve at the same value of `axis` (KL or perception).

    The two neighbours on the curve are interpolated item by item. None if the value lies outside the curve.
    """
    ordered = sorted(curve, key=axis)
    at = axis(point)
    for left, right in pairwise(ordered):
        low, high = axis(left), axis(right)
        if low <= at <= high and high > low:
            share = (at - low) / (high - low)
            solved = [np.asarray(each.marks.right["sum"], dtype=float) for each in (left, right, point)]
            return solved[2] - ((1 - share) * solved[0] + share * solved[1])
    return None


def above_curve(point: Point, curve: Sequence[Point], axis: Callable[[Point], float]) -> Estimate | None:
    """Reasoning of `point` minus a baseline curve at equal `axis`: the bootstrapped mean of `above_items`, which makes
    the difference paired. None outside the curve."""
    items = above_items(point, curve, axis)
    return None if items is None else bootstrap([items])
