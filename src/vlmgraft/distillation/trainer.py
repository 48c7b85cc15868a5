"""The training loop of gates: settings, gradient steps, a log, and a state to resume from."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from vlmgraft.checkpoint.writer import save_tensors
from vlmgraft.distillation.budget import BudgetControl, FixedWeight, Rotation, largest_within
from vlmgraft.distillation.distributed import of_all, shared
from vlmgraft.distillation.gate_vector import GateVector, Granularity
from vlmgraft.distillation.gated_layers import GatedLayers
from vlmgraft.distillation.targets import TargetBatch, Targets
from vlmgraft.errors import CheckpointError, NumericalError, RecipeError
from vlmgraft.hf.batches import Progress
from vlmgraft.methods.frism import check_budget
from vlmgraft.spectral.gates import histogram
from vlmgraft.storage.files import make_folder
from vlmgraft.storage.torchrun import agreed, check_same, process

Inject = Literal["energy", "donor"]

DEFAULT_WEIGHT = {"energy": 0.1, "donor": 1.0}
MOVED, LONGEST = 0.6, 16
"""How far a logit may move between two observations of the KL (Adam moves it by about the learning rate per step), and
the most steps between two observations."""
WATCHED = 32
"""Held-out questions per observation of the KL, others every time; the final KL meets the budget on all of them."""
CLOSING, OPENING = -12.0, {"energy": 12.0, "donor": 1.0}
"""Range of the shift of all logits after the last step. The energy term rewards open gates; donor matching may have
closed them to match the donor, so there only a small remaining error of the controller is corrected."""


@dataclass(frozen=True)
class Training:
    """Settings of one training of gates; the fields are those of the recipe's `method`.

    batches_per_step: gradients of this many batches are averaged for one step, divided among the processes of a
    torch.distributed group; the gates do not depend on the number of processes. gradient_checkpointing: recompute
    decoder layers in the backward pass instead of keeping their activations; less memory, the same gates.
    """

    scale: float = 1.0
    inject: Inject = "energy"
    inject_weight: float | None = None
    kl_budget: float | None = None
    granularity: Granularity = "direction"
    steps: int = 200
    learning_rate: float = 0.05
    batches_per_step: int = 1
    seed: int = 0
    log_every: int = 10
    gradient_checkpointing: bool = False

    def __post_init__(self) -> None:
        if self.inject not in DEFAULT_WEIGHT:
            raise RecipeError(f'inject: {self.inject!r} is neither "energy" nor "donor"')
        if self.inject_weight is not None and self.kl_budget is not None:
            raise RecipeError("inject_weight and kl_budget exclude each other: the budget sets the weight")
        if self.kl_budget is not None:
            check_budget(self.kl_budget)
        if self.batches_per_step < 1:
            raise RecipeError(f"batches_per_step: {self.batches_per_step} must be at least 1")
        if self.steps < 0 or not self.learning_rate > 0:
            raise RecipeError(f"steps ({self.steps}) and learning_rate ({self.learning_rate}) must be positive")

    @property
    def observe_every(self) -> int:
        """Steps between two observations of the KL under a budget."""
        return max(1, min(LONGEST, round(MOVED / self.learning_rate)))

    def learning_rate_at(self, step: int) -> float:
        """Cosine from the learning rate to a twentieth of it: without decay the KL does not settle on a budget."""
        return self.learning_rate * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * step / max(1, self.steps))))


@dataclass
class GateTrainer:
    """One training: the loop, its log, and its state on disk.

    targets: what the gated model must agree with. donor: the donor's targets, used when `inject` is "donor". monitor:
    held-out targets on which the KL is measured, given exactly when there is a budget.
    """

    model: Any
    training: Training
    vector: GateVector
    layers: GatedLayers
    targets: Targets
    donor: Targets | None
    monitor: Targets | None
    on_step: Callable[[dict[str, Any]], None] | None
    progress: Progress | None = None
    log: list[dict[str, Any]] = field(default_factory=list)
    held_out_kl: float | None = None
    held_out_upper: float | None = None
    landing: float | None = None

    def __post_init__(self) -> None:
        training = self.training
        start = DEFAULT_WEIGHT[training.inject] if training.inject_weight is None else training.inject_weight
        self.control: FixedWeight | BudgetControl = FixedWeight(start)
        if training.kl_budget is not None:
            self.control = BudgetControl(training.kl_budget, start)
        self.optimizer = torch.optim.Adam([self.vector.logits], lr=training.learning_rate)
        self.parts = () if self.monitor is None else self.monitor.parts(WATCHED)
        self.rotation = Rotation([part.tokens for part in self.parts])

    def train(self, state: Path | None = None, save_every: int = 10) -> None:
        """The loop: observe the KL, one gradient step, log, save the state; at the end, meet the budget."""
        training = self.training
        first = self._restore(state) if state is not None else 0
        check_same("what the training starts from", self._fingerprint(first))
        count = training.batches_per_step
        keep = islice(self.targets.order(training.seed), first * count, None)
        donor = None
        if training.inject == "donor" and self.donor is not None:
            donor = islice(self.donor.order(training.seed + 1), first * count, None)
        for step in range(first, training.steps):
            self._observe(step)
            for group in self.optimizer.param_groups:
                group["lr"] = training.learning_rate_at(step)
            row = self._step(list(islice(keep, count)), list(islice(donor, count)) if donor else [])
            if step % training.log_every == 0 or step == training.steps - 1:
                self._record({"step": step, **row})
            if state is not None and (step + 1) % save_every == 0:
                self._keep(state, step + 1)
            if self.progress is not None:
                self.progress(step + 1, training.steps, "gates")
        if self.monitor is not None:
            self._land(self.monitor, training.kl_budget or 0.0)

    @torch.no_grad()
    def _land(self, monitor: Targets, budget: float) -> None:
        """Shift all logits by one constant such that the KL on all held-out prompts is just within the budget; gates
        that donor matching leaves well below the budget stay as they are."""
        logits, limit = self.vector.logits, OPENING[self.training.inject]
        trained = logits.detach().clone()
        uppers: dict[float, float] = {}

        def kl_at(shift: float) -> float:
            logits.copy_(trained + shift)
            if monitor.whole:
                return self._measure(monitor)
            self.layers.set(self.vector.spectra(self.training.scale)[0])
            lower, uppers[shift] = monitor.mean_bounds(self.model)
            return lower

        shift, self.held_out_kl = largest_within(kl_at, budget, CLOSING, limit)
        if shift == limit and self.training.inject == "donor":
            shift, self.held_out_kl = 0.0, kl_at(0.0)
        logits.copy_(trained + shift)
        self.landing, self.held_out_upper = shift, uppers.get(shift)

    def _step(self, keep: Sequence[TargetBatch], donor: Sequence[TargetBatch]) -> dict[str, float]:
        """One gradient step over all batches of all processes; returns its figures."""
        weight: float = self.control.weight
        logits = self.vector.logits
        share = self.vector.spectra(self.training.scale)[1]
        gradient = _slope((0.0 if donor else -weight) * share, logits)
        sums = torch.zeros(2, device=logits.device)
        terms: tuple[tuple[Sequence[TargetBatch], float], ...] = ((keep, 1.0), (donor, weight))
        for index, (batches, factor) in enumerate(terms):
            for batch, counts in shared(batches):
                self.layers.set(self.vector.spectra(self.training.scale)[0])
                kl = counts * batch.kl(self.model).mean() / len(batches)
                for part in of_all(torch.cat([_slope(factor * kl, logits), kl.detach()[None]])):
                    gradient += part[:-1]
                    sums[index] += part[-1]
        logits.grad = gradient
        kept, energy = float(sums[0]), float(share.detach())
        injection = float(sums[1]) if donor else -energy
        loss = kept + weight * injection
        if not math.isfinite(loss):
            raise NumericalError(f"the loss is {loss}: lower learning_rate ({self.training.learning_rate})")
        self.optimizer.step()
        self.control.step()
        figures: dict[str, float] = {"loss": loss, "kl": kept, "inject": injection, "energy": energy}
        return {key: round(value, 7) for key, value in figures.items()} | {"inject_weight": weight}

    def _observe(self, step: int) -> None:
        if isinstance(self.control, BudgetControl) and step % self.training.observe_every == 0:
            self.control.observe(self.rotation.observe(lambda part: self._measure(self.parts[part])))

    @torch.no_grad()
    def _measure(self, monitor: Targets) -> float:
        self.layers.set(self.vector.spectra(self.training.scale)[0])
        return monitor.mean_kl(self.model)

    def _record(self, row: dict[str, Any]) -> None:
        row["histogram"] = histogram(self.vector.opened())
        self.log.append(row)
        if self.on_step is not None:
            self.on_step(row)

    def summary(self) -> dict[str, Any]:
        """How the gates were made, for gates.json."""
        training = self.training
        fields = ("inject", "kl_budget", "granularity", "steps", "learning_rate", "batches_per_step", "seed")
        summary = {key: getattr(training, key) for key in fields} | {"inject_weight": self.control.weight}
        if self.held_out_kl is not None:
            summary |= {"held_out_kl": self.held_out_kl, "landing": self.landing}
        if self.held_out_upper is not None:
            summary |= {"held_out_kl_upper": self.held_out_upper}
        return summary | {"energy": float(self.vector.spectra(1.0)[1].detach())}

    def _identity(self) -> dict[str, Any]:
        """What a saved state must match before training resumes from it."""
        training = dataclasses.asdict(self.training)
        del training["gradient_checkpointing"]  # memory only: the gates are the same
        return {
            "training": training,
            "matrices": dict(zip(self.vector.names, self.vector.sizes, strict=True)),
            "spectrum": float(self.vector.norm),
            "targets": self.targets.digest,
            "donor": self.donor.digest if self.donor is not None else None,
        }

    def _keep(self, state: Path, step: int) -> None:
        """Write logits, both moments of Adam, the control and the log, atomically."""
        if process()[0] != 0:
            return
        adam = self.optimizer.state[self.vector.logits]
        tensors = {"logits": self.vector.logits.detach(), "mean": adam["exp_avg"], "square": adam["exp_avg_sq"]}
        control = self.control.state() | {"rotation": self.rotation.state()}
        rest = {"step": step, "control": control, "log": self.log, "identity": self._identity_json}
        make_folder(state.parent)
        tensors = {key: value.cpu().contiguous() for key, value in tensors.items()}
        save_tensors(tensors, state, {"state": json.dumps(rest)})

    @cached_property
    def _identity_json(self) -> dict[str, Any]:
        return json.loads(json.dumps(self._identity()))

    def _read(self, state: Path) -> tuple[dict[str, Any], dict[str, Tensor]] | None:
        """The content of a state file, None if there is none."""
        if not state.is_file():
            return None
        try:
            with safe_open(state, framework="pt") as file:
                rest = json.loads(file.metadata()["state"])
                tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
            same = rest["identity"] == self._identity_json and "rotation" in rest["control"]
        except (SafetensorError, ValueError, TypeError, KeyError) as error:
            raise CheckpointError(f"{state}: is damaged ({error!s:.200}); remove it to learn from the start") from error
        if not same:
            raise RecipeError(
                f"{state}: belongs to a training with other settings, factors or questions; remove it, or use these"
            )
        return rest, tensors

    def _fingerprint(self, first: int) -> str:
        """Fingerprint of everything that must be the same in all processes before the first step."""
        if process()[1] == 1:
            return ""
        state = hashlib.sha256(json.dumps([first, self._identity_json, self.control.state()], sort_keys=True).encode())
        state.update(self.vector.logits.detach().cpu().numpy().tobytes())
        return state.hexdigest()

    def _restore(self, state: Path) -> int:
        """Restore a saved state; returns the number of steps already done, 0 if there is no state."""
        kept = agreed(lambda: self._read(state))
        if kept is None:
            return 0
        rest, tensors = kept
        rotation = rest["control"].pop("rotation")
        tensors = {key: tensor.to(self.vector.logits.device) for key, tensor in tensors.items()}
        with torch.no_grad():
            self.vector.logits.copy_(tensors["logits"])
        step = torch.tensor(float(rest["step"]))
        self.optimizer.state[self.vector.logits] = {
            "step": step,
            "exp_avg": tensors["mean"],
            "exp_avg_sq": tensors["square"],
        }
        self.log, self.rotation = rest["log"], Rotation(self.rotation.tokens, **rotation)
        for key, value in rest["control"].items():
            setattr(self.control, key, value)
        return int(rest["step"])


def _slope(value: Tensor, logits: Tensor) -> Tensor:
    """The gradient with respect to the logits; `logits.grad` is None afterwards. FSDP2's hooks need `backward`."""
    logits.grad = None
    value.backward()
    slope, logits.grad = logits.grad, None
    assert slope is not None
    return slope
