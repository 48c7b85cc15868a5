"""Fine-tuning on the lab: with and without DRIFT's prior, at equal data and steps, chosen on validation.

Every arm learns the same few image sums with a chain of thought, for the same number of steps in the same order. What
is chosen (learning rate of plain fine-tuning, strength of a push) is chosen on the validation exam as in `compare.py`:
the best reasoning within a point of the VLM's perception. Candidates and test rows are JSON lines; what a file holds
already is not made again.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from vlmgraft.alignment import Alignment, align
from vlmgraft.checkpoint.index import open_checkpoint
from vlmgraft.data.traces import Trace, Traces
from vlmgraft.finetuning.callback import DriftCallback
from vlmgraft.finetuning.delta import filtered_prior, make_prior
from vlmgraft.finetuning.prior import Prior, PushRule
from vlmgraft.finetuning.trainer import build_trainer, freeze_vision, trainer_arguments
from vlmgraft.hf.modules import match_linears
from vlmgraft.lab import world
from vlmgraft.lab.compare import PERCEPTION_SLACK, Comparison, Sizes
from vlmgraft.lab.exam import ExamResult
from vlmgraft.spectral.factors import Factors, factorize
from vlmgraft.spectral.gates import Gates
from vlmgraft.spectral.task_vector import TaskVectors
from vlmgraft.storage.files import scratch_folder
from vlmgraft.storage.jsonl import append_row, read_rows

TRACES, STEPS, BATCH = 64, 64, 8
RATES = (5e-5, 1e-4, 2e-4, 4e-4)
"""Learning rates of plain fine-tuning; every other arm takes the one chosen for it."""
STRENGTHS: Mapping[str, tuple[float, ...]] = {
    "adaptive": (0.1, 0.3, 1.0),
    "grad_norm": (0.05, 0.15, 0.5),
    "absolute": (0.003, 0.01, 0.03),
}
FRISM = (1.0, 0.1)
"""λ and α of the gates (energy term) that filter a prior, and of the merge that is fine-tuned afterwards."""


@dataclass(frozen=True)
class Arm:
    """One row: how gradients are pushed (mode none: not at all), over which modules, and where training starts.

    strength: not chosen but given, for a comparison at equal strength.
    """

    name: str
    mode: str = "none"
    modules: tuple[str, ...] = ("attention",)
    minus: str = "vlm"
    filtered: bool = False
    start: str = "vlm"
    strength: float | None = None


BOTH = ("attention", "mlp")
ARMS = (
    Arm("SFT"),
    *(Arm(f"DRIFT {mode}, attention", mode) for mode in ("absolute", "grad_norm", "adaptive")),
    *(Arm(f"DRIFT {mode}, attention + mlp", mode, BOTH) for mode in ("absolute", "grad_norm", "adaptive")),
    Arm("DRIFT adaptive, attention + mlp, Δ minus base", "adaptive", BOTH, "base"),
    Arm("DRIFT adaptive, filtered by FRISM's gates", "adaptive", BOTH, "base", filtered=True),
    Arm("FRISM, then SFT", start="frism"),
    Arm("for comparison, a = 1: Δ minus VLM", "adaptive", BOTH, strength=1.0),
    Arm("for comparison, a = 1: Δ minus base", "adaptive", BOTH, "base", strength=1.0),
)


@dataclass
class Study:
    """One trio: its comparison (exams, KL), its traces, and the rows that `out` holds.

    seed: of exams, traces and training order; the trio is what it is. carried: rows of another trio, whose strengths
    are taken over as they were chosen on its validation split; only the learning rate of plain fine-tuning is chosen
    anew, and used by every arm.
    """

    trio: Path
    out: Path
    seed: int = 0
    traces_count: int = TRACES
    steps: int = STEPS
    carried: Path | None = None
    arms: tuple[Arm, ...] = ARMS
    sizes: Sizes = field(default_factory=Sizes)
    report: Any = print
    alignment: Alignment = field(init=False)

    def __post_init__(self) -> None:
        self.alignment = self._align(BOTH)

    def run(self) -> list[dict[str, Any]]:
        """Make the rows that are missing and give all test rows."""
        self.out.parent.mkdir(parents=True, exist_ok=True)
        self._once("VLM", {}, lambda: self._test(self.comparison.vlm))
        self._once("FRISM", {}, lambda: self._test(self.start("frism")))
        for arm in self.arms:
            setting = self.choose(arm)
            self._once(arm.name, setting, partial(self._tuned_and, self._test, arm, setting))
        return list(_tests(self.out).values())

    def choose(self, arm: Arm) -> dict[str, float]:
        """The arm's setting with the best validation marks; its strength may be carried over."""
        if arm.strength is not None:
            return {**self.choose(self.arms[0]), "strength": arm.strength}
        if self.carried is not None and arm != self.arms[0]:
            strength = _tests(self.carried)[arm.name]["setting"]["strength"]
            return {**self.choose(self.arms[0]), "strength": strength}
        if arm.mode == "none":
            settings = [{"learning_rate": rate, "strength": 0.0} for rate in RATES]
        else:
            rate = self.choose(self.arms[0])["learning_rate"]
            settings = [{"learning_rate": rate, "strength": strength} for strength in STRENGTHS[arm.mode]]
        vlm_perception = self._once("VLM", {}, lambda: self._validate(self.comparison.vlm), "validation")["perception"][
            "mean"
        ]
        scored = []
        for setting in settings:
            make = partial(self._tuned_and, self._validate, arm, setting)
            row = self._once(arm.name, setting, make, "validation")
            seen, solved = row["perception"]["mean"], row["reasoning"]["mean"]
            qualifies = seen >= vlm_perception - PERCEPTION_SLACK
            scored.append(((qualifies, solved if qualifies else seen), setting))
        return max(scored, key=lambda pair: pair[0])[1]

    def tuned(self, arm: Arm, learning_rate: float, strength: float) -> Any:
        """A copy of the arm's starting model, fine-tuned."""
        model = self.start(arm.start)
        freeze_vision(model)
        drift = None
        if arm.mode != "none":
            drift = DriftCallback(self.prior(arm, strength))
        fine_tune(model, self.comparison.processor, self.traces, self.steps, learning_rate, self.seed, drift)
        return model.eval()

    def prior(self, arm: Arm, strength: float) -> Prior:
        """The arm's prior."""
        rule = PushRule(arm.mode, strength)  # type: ignore[arg-type]
        if arm.filtered:
            return filtered_prior(self.alignment, self.factors, self.gates, rule)
        return make_prior(self._align(arm.modules), rule, minus=arm.minus)  # type: ignore[arg-type]

    def start(self, name: str) -> Any:
        """A fresh copy of the VLM, or of the VLM with FRISM's gates folded in."""
        model = copy.deepcopy(self.comparison.vlm)
        if name == "frism":
            for tensor, linear in match_linears(model, self.factors).items():
                factor = self.factors[tensor]
                linear.weight.data += factor.update(self.gates.spectrum(tensor, factor.s))
        return model

    @cached_property
    def comparison(self) -> Comparison:
        """Exams, teacher's answers and KL."""
        return Comparison(self.trio, self.alignment, self.factors, self.seed, report=self.report, sizes=self.sizes)

    @cached_property
    def factors(self) -> dict[str, Factors]:
        """Of the donor's task vector."""
        with TaskVectors(self.alignment) as taus:
            return {name: factorize(taus.load(name), name, taus.role(name)) for name in taus.names}

    @cached_property
    def gates(self) -> Gates:
        """FRISM's, with the published energy term."""
        return self.comparison.gates("energy", *FRISM)

    @cached_property
    def traces(self) -> Traces:
        """Image sums of the training split, worked out."""
        rng = np.random.default_rng([self.seed, 41])
        traces = []
        for _ in range(self.traces_count):
            item = world.draw_item(rng, "sum")
            if item.scene is None:
                raise AssertionError("a sum without a scene")
            parts = ({"type": "image"}, {"type": "text", "text": item.question})
            prompt = ({"role": "user", "content": list(parts)},)
            traces.append(Trace(prompt, item.answer, (world.render(rng, item.scene, "train"),)))
        return Traces(tuple(traces), "lab sums")

    def _align(self, modules: tuple[str, ...]) -> Alignment:
        return align(*(open_checkpoint(self.trio / name) for name in ("vlm", "donor", "base")), modules=modules)

    def _once(self, name: str, setting: Mapping[str, float], make: Any, split: str = "test") -> dict[str, Any]:
        """The row of this name, setting and split, made now if the file does not hold it."""
        label = f"{split} {name} {dict(setting)}"
        for row in read_rows(self.out) if self.out.is_file() else ():
            if f"{row['split']} {row['method']} {row['setting']}" == label:
                return row
        row = {"split": split, "method": name, "setting": dict(setting), "seed": self.seed, **make()}
        append_row(self.out, row)
        figures = f"reasoning {100 * row['reasoning']['mean']:.1f}, perception {100 * row['perception']['mean']:.1f}"
        self.report(f"{label}: {figures}")
        return row

    def _tuned_and(self, measure: Any, arm: Arm, setting: Mapping[str, float]) -> dict[str, Any]:
        return measure(self.tuned(arm, **setting))

    def _validate(self, model: Any) -> dict[str, Any]:
        return _figures(self.comparison.validation.mark(model, self.comparison.processor))

    def _test(self, model: Any) -> dict[str, Any]:
        marks = self.comparison.test.mark(model, self.comparison.processor)
        right = {task: np.asarray(values).astype(int).tolist() for task, values in marks.right.items()}
        return {**_figures(marks), "kl": self.comparison.distiller.keep_kl(model), "right": right}


def _tests(file: Path) -> dict[str, dict[str, Any]]:
    """Test rows by method."""
    return {row["method"]: row for row in read_rows(file) if row["split"] == "test"}


def _figures(marks: ExamResult) -> dict[str, Any]:
    return {"reasoning": asdict(marks.reasoning), "perception": asdict(marks.perception)}


def fine_tune(
    model: Any, processor: Any, traces: Traces, steps: int, learning_rate: float, seed: int, drift: DriftCallback | None
) -> None:
    """Train a model in place with the command's own trainer and its defaults, on the CPU, without checkpoints."""
    with scratch_folder() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        settings = {"max_steps": steps, "learning_rate": learning_rate, "seed": seed, "save_strategy": "no"}
        quiet = {"disable_tqdm": True, "use_cpu": True, "logging_steps": steps, "per_device_train_batch_size": BATCH}
        arguments = trainer_arguments(folder, {**settings, **quiet})
        trainer = build_trainer(model, processor, traces, arguments, drift=drift)
        torch.manual_seed(seed)
        trainer.train()
