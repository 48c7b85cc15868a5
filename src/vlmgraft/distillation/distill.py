"""FRISM's second stage: gates learned by self-distillation, without labels.

    loss = KL(P_vlm ‖ P_W(g)) + α · injection        W(g) = W_vlm + λ U diag(σ(g) ⊙ s) Vh, only g is trained

The KL is averaged over the tokens of the original VLM's own greedy answers. The injection term is `energy`,
−Σ‖σ(g) ⊙ s‖² / Σ‖s‖² (published), or `donor`, KL(P_donor ‖ P_W(g)) on the donor's own greedy answers to unlabelled text
questions (ours). α is given (`inject_weight`), or follows a budget of KL divergence in nats per token (`kl_budget`),
measured on held-out prompts.

In memory, many times in one process:

    distiller = Distiller(vlm, processor, factors, questions, held_out=more_questions)    # caches the teacher once
    donor = distiller.donor_targets(donor_model, donor_tokenizer, text_questions)          # caches the donor once
    gates = distiller.learn(scale=1.25, inject="energy", inject_weight=0.1, steps=150)
    gates = distiller.learn(scale=1.25, inject="donor", donor=donor, inject_weight=1.0, steps=150)
    gates = distiller.learn(scale=1.25, inject="donor", donor=donor, kl_budget=0.01)
    distiller.keep_kl(gates), distiller.keep_kl(weights_by_tensor_name), distiller.keep_kl(merged_model, targets)
    with distiller.applied(gates): generate_batch(vlm, processor, questions, 32)           # the gated model in memory

`factors` maps VLM tensor names on disk to `Factors`; the model is left exactly as it was between calls.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from numpy.typing import ArrayLike
from torch import Tensor, nn

from vlmgraft.data.endpoint import Endpoint
from vlmgraft.distillation.gate_vector import GateVector
from vlmgraft.distillation.gated_layers import GatedLayers, checkpointed, gated
from vlmgraft.distillation.projections import Backend
from vlmgraft.distillation.prompts import Tokens
from vlmgraft.distillation.risk_control import SCALINGS, Bound, Certified, certify
from vlmgraft.distillation.sharding import gate_and_shard
from vlmgraft.distillation.targets import DONOR_BATCH, Targets
from vlmgraft.distillation.teacher import Packing, TeacherOutputs, build_targets
from vlmgraft.distillation.trainer import GateTrainer, Training
from vlmgraft.errors import DataError, RecipeError
from vlmgraft.hf.batches import Progress, Question
from vlmgraft.hf.modules import Projection, is_sharded, match_projections, put
from vlmgraft.spectral.factor_store import stored_digest
from vlmgraft.spectral.factors import Factors
from vlmgraft.spectral.gates import Gates
from vlmgraft.storage.resources import out_of_memory

FEW_PROMPTS = 128


@dataclass
class Distiller:
    """Holds a VLM, its factors and the cached targets; see the module docstring.

    Factors in a store are read into memory (keep_factors False: read from disk when needed, one matrix at a time). The
    store's digest is recorded in the gates, which then fold with these factors only. targets, held_out_targets: the
    teacher's answers and distributions on `questions` and `held_out`; cache: folder that keeps them. answer_batch_size,
    answer_batch_tokens, batch_tokens, packing, tokens: see `teacher_outputs`. A model sharded over processes
    (`sharding.shard`) stays gated, with sharded factors, once gates are needed; no more targets can be made after that.
    offload: the model was sharded with offloading, and its factors will be. endpoint: a server of the VLM that answers
    in its place. Raises DataError and AlignmentError before any computation when the inputs do not fit together.
    """

    model: Any
    processor: Any
    factors: Mapping[str, Factors]
    questions: Sequence[Question]
    held_out: Sequence[Question] = ()
    max_new_tokens: int = 64
    batch_size: int = 48
    answer_batch_size: int | None = None
    answer_batch_tokens: int | None = None
    batch_tokens: int | None = None
    packing: Packing = "shuffle"
    backend: Backend = "auto"
    seed: int = 0
    progress: Progress | None = None
    tokens: Tokens = "answer"
    cache: Path | None = None
    keep_factors: bool = True
    offload: bool = False
    endpoint: Endpoint | None = None
    digest: str | None = field(init=False, default=None)
    sharded: bool = field(init=False)
    linears: dict[str, Any] = field(init=False)
    targets: Targets = field(init=False)
    held_out_targets: Targets | None = field(init=False, default=None)
    _layers: GatedLayers | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        self.digest = stored_digest(self.factors)
        if self.keep_factors:
            self.factors = dict(self.factors)
        self.sharded = is_sharded(self.model)
        self.linears: dict[str, Projection] = match_projections(self.model, self.factors)
        self.targets = self.teacher_targets(self.questions)
        if self.held_out:
            self.held_out_targets = self.teacher_targets(self.held_out)

    def teacher_targets(self, questions: Sequence[Question]) -> Targets:
        """The original VLM's answers and log-probabilities for these questions."""
        return self._build((self.model, self.processor), questions, self.batch_size, endpoint=self.endpoint)

    def donor_targets(
        self,
        donor: Any,
        tokenizer: Any,
        questions: Sequence[Question],
        batch_size: int = DONOR_BATCH,
        max_new_tokens: int | None = None,
    ) -> Targets:
        """The donor's answers to text questions, as targets for the VLM; the donor is not needed afterwards.
        max_new_tokens: limit for these answers, if it differs from the VLM's. Use `targets_from` for models that do not
        fit into memory together."""
        if any(question.images for question in questions):
            raise DataError("donor questions are text only: the donor sees no images")
        return self._build((donor, tokenizer), questions, batch_size, max_new_tokens)

    def targets_from(self, outputs: TeacherOutputs) -> Targets:
        """Another teacher's outputs as targets for the VLM; raises RecipeError once the model is sharded and gated."""
        self._check_readable()
        return outputs.targets((self.model, self.processor))

    def _build(
        self,
        teacher: tuple[Any, Any],
        questions: Sequence[Question],
        batch_size: int,
        max_new_tokens: int | None = None,
        endpoint: Endpoint | None = None,
    ) -> Targets:
        self._check_readable()
        return build_targets(
            teacher,
            (self.model, self.processor),
            questions,
            max_new_tokens=max_new_tokens or self.max_new_tokens,
            batch_size=batch_size,
            answer_batch_size=self.answer_batch_size,
            answer_batch_tokens=self.answer_batch_tokens,
            batch_tokens=self.batch_tokens,
            packing=self.packing,
            tokens=self.tokens,
            cache=self.cache,
            seed=self.seed,
            endpoint=endpoint,
            progress=self.progress,
        )

    @contextmanager
    def applied(self, gates: Gates | Mapping[str, Tensor]) -> Iterator[Any]:
        """The model with gates, or with other weights (tensor name → matrix), inside the context."""
        if isinstance(gates, Gates):
            with self.gated() as layers, torch.no_grad():
                layers.set({name: gates.spectrum(name, self.factors[name].s) for name in self.factors})
                yield self.model
            return
        projections = match_projections(self.model, gates)
        before = dict[str, Tensor]()
        try:
            for name, projection in projections.items():
                before[name] = put(projection, gates[name])
            yield self.model
        finally:
            for name, weight in before.items():
                put(projections[name], weight)

    def keep_kl(
        self,
        what: Gates | Mapping[str, Tensor] | nn.Module | None,
        held_out: Sequence[Question] | Targets | None = None,
    ) -> float:
        """KL(P_vlm ‖ P) in nats per answer token, for gates, other weights, another model, or (None) the VLM.

        held_out: questions or cached targets; default: the distiller's own held-out set. Another model must accept the
        inputs that the VLM's processor makes; its own embeddings and vision tower are used.
        """
        targets = self._held_out(held_out)
        if what is None:
            return targets.mean_kl(self.model)
        if isinstance(what, nn.Module):
            return targets.mean_kl(what, replayed=False)
        with self.applied(what) as model:
            return targets.mean_kl(model)

    @contextmanager
    def measuring(
        self, held_out: Sequence[Question] | Targets | None = None
    ) -> Iterator[Callable[[Mapping[str, Tensor]], float]]:
        """Inside the context, a function from spectra (λ σ(g) ⊙ s by tensor name) to the KL on prompts (`keep_kl`).
        The gated layers are swapped in once, for many measurements in a row."""
        targets = self._held_out(held_out)
        with self.gated() as layers, torch.no_grad():

            def measure(spectra: Mapping[str, Tensor]) -> float:
                layers.set(spectra)
                return targets.mean_kl(self.model)

            yield measure

    def learn(
        self,
        scale: float = 1.0,
        *,
        donor: Targets | None = None,
        start: Gates | float = 0.0,
        on_step: Callable[[dict[str, Any]], None] | None = None,
        state: Path | None = None,
        save_every: int = 10,
        **settings: Any,
    ) -> Gates:
        """Train gates and return them frozen; `settings` are the other fields of `Training`.

        start: warm start, or one logit for all. on_step: called with every logged row. state: a file to which the
        training is saved every `save_every` steps. If it exists, training resumes from it and gives the gates of an
        uninterrupted run. Under torch.distributed every process calls this with the same arguments. The batches of a
        step are divided among the processes, so `batches_per_step` should be a multiple of their number, and all
        processes must see the file `state`.

        Raises RecipeError when the settings need targets that were not given, or `state` belongs to another training;
        NumericalError when the loss stops being finite.
        """
        training = Training(scale=scale, **settings)
        if training.inject == "donor" and donor is None:
            raise RecipeError("inject: donor needs `donor`, the targets made by donor_targets from text questions")
        if training.kl_budget is not None:
            self._check_budget()
        vector = GateVector(self.factors, training.granularity, start, self.model.device)
        monitor = self.held_out_targets if training.kl_budget is not None else None
        remedy = "lower method.calibration.batch_size or method.rank, or set method.gradient_checkpointing: true"
        with (
            out_of_memory("training gates", remedy),
            self.gated() as layers,
            checkpointed(self.model, training.gradient_checkpointing),
        ):
            trainer = GateTrainer(
                self.model, training, vector, layers, self.targets, donor, monitor, on_step, self.progress
            )
            trainer.train(state, save_every)
        return Gates(vector.frozen(), scale, trainer.summary(), tuple(trainer.log), self.digest)

    def certify(
        self, gates: Gates, prompts: Targets, budget: float, cap: float, bound: Bound
    ) -> tuple[Gates, Certified]:
        """Scale λ of the gates by the largest t of 1/20, 2/20, … 1 up to which the bound is within the budget (nats per
        token). prompts: used neither to train the gates nor to control α. See `risk_control.certify`."""
        full = {name: gates.spectrum(name, self.factors[name].s) for name in self.factors}
        own: dict[int, Tensor] = {}
        with self.gated() as layers, torch.no_grad():
            if not prompts.whole:
                layers.set({name: 0 * spectrum for name, spectrum in full.items()})
                prompts.prompt_kl(self.model, own)  # fills `own` with the teacher's hidden states

            def divergences(t: float) -> ArrayLike:
                layers.set({name: t * spectrum for name, spectrum in full.items()})
                return prompts.prompt_kl(self.model, own).numpy()

            certified = certify(divergences, SCALINGS, budget, cap, bound)
        return replace(gates, scale=gates.scale * certified.t), certified

    @contextmanager
    def gated(self) -> Iterator[GatedLayers]:
        """Swap in gated layers inside the context, gates off at first; a sharded model keeps them afterwards."""
        if not self.sharded:
            with gated(self.model, self.linears, self.factors, self.backend) as layers:
                yield layers
            return
        if self._layers is None:
            self.model, self._layers = gate_and_shard(
                self.model, self.linears, self.factors, self.backend, offload=self.offload
            )
            self.linears = dict(self._layers)
        try:
            yield self._layers
        finally:
            self._layers.set(None)

    def _held_out(self, held_out: Sequence[Question] | Targets | None) -> Targets:
        if isinstance(held_out, Targets):
            return held_out
        if held_out is not None:
            return self.teacher_targets(held_out)
        if self.held_out_targets is None:
            raise DataError("no held-out questions: give the distiller `held_out`, or pass questions here")
        return self.held_out_targets

    def _check_readable(self) -> None:
        if self._layers is not None:
            raise RecipeError("the model is sharded: make all targets before gates are learned")

    def _check_budget(self) -> None:
        if self.held_out_targets is None:
            raise RecipeError("kl_budget is measured on prompts that are not trained on: give held-out questions")
        if self.held_out_targets.questions < FEW_PROMPTS:
            warnings.warn(
                f"kl_budget is measured on {self.held_out_targets.questions} held-out prompts; below {FEW_PROMPTS} the "
                "measured KL is noisy",
                stacklevel=3,
            )
