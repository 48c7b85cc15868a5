"""What is added to the VLM by learning, as ΔW at a strength: gates, all projection weights, and fine-tuning on traces.

FRISM's gates and curvature gates are the package's own commands under one budget of KL. Three more are controls:
`FRISM shuffled` has the gates of donor matching in another order within each matrix, so that as much is open, in
directions of no choice; `all weights` trains every projection with donor matching's losses and budget; `DRIFT` and
`plain tuning` are `vlmgraft tune` on 500 traces of sums on pictures, equal steps, with and without the prior.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file
from torch import Tensor

import vlmgraft as vg
from experiments.lab.all_weights import learn_weights
from experiments.pretrained.models import training_dtype
from vlmgraft.checkpoint.index import open_checkpoint
from vlmgraft.checkpoint.reader import Reader
from vlmgraft.checkpoint.writer import save_tensors
from vlmgraft.distillation.loading import distiller_for
from vlmgraft.recipe.resolve import resolve
from vlmgraft.spectral.factor_store import open_store
from vlmgraft.spectral.gate_store import load_gates
from vlmgraft.storage.files import make_folder
from vlmgraft.storage.jsonl import write_json

if TYPE_CHECKING:
    from experiments.pretrained.table import Table

BUDGET = 0.03
STRENGTHS = (0.75, 1.0, 1.25)
"""Factors on what was learned."""
SHUFFLED_STRENGTHS = (0.5, 0.62, 0.75)
"""Of shuffled gates, all on test; the second was set to the KL of the gates themselves."""
TUNE_STRENGTHS = (0.5, 0.75, 1.0)
"""Of fine-tuning: parts of the way from the VLM."""
GATES: dict[str, dict[str, Any]] = {
    "FRISM energy": {"inject": "energy"},
    "FRISM donor": {"inject": "donor", "questions": "text-sums"},
    "FRISM donor words": {"inject": "donor", "questions": "words"},
    "curvature": {"name": "curvature"},
}
"""Methods of gates; questions: which text questions donor matching sees, sums of the tested kind, or word problems."""
SHUFFLED, ALL_WEIGHTS = "FRISM shuffled", "all weights"
PRIORS: dict[str, dict[str, Any]] = {
    "plain tuning": {"mode": "none"},
    "DRIFT": {"mode": "adaptive", "delta": "base", "modules": ["attention", "mlp"]},
}
LEARNED = (*GATES, SHUFFLED, ALL_WEIGHTS, *PRIORS)
Change = Callable[[float], Mapping[str, Tensor]]


def learned(table: Table, method: str) -> tuple[Change, tuple[float, ...]]:
    """(ΔW by role as a function of the strength, the strengths to try); learns what is not there yet."""
    if method in PRIORS:
        return _tuned(table, method), TUNE_STRENGTHS
    if method == ALL_WEIGHTS:
        return _all_weights(table), STRENGTHS
    return _gated(table, method), SHUFFLED_STRENGTHS if method == SHUFFLED else STRENGTHS


def recipe(table: Table, method: str, budget: float = BUDGET) -> dict[str, Any]:
    """The recipe of a method of gates under a budget of KL."""
    data, options, sizes = table.trio.folder / "data", dict(GATES[method]), table.trio.sizes
    calibration: dict[str, Any] = {"samples": sizes.calibration, "held_out": sizes.held_out}
    calibration |= {"max_new_tokens": 48, "batch_size": 16}
    calibration["data"] = str(data / "calibration.jsonl")
    if questions := options.pop("questions", None):
        options["questions"] = str(data / f"{questions}.jsonl")
    if options.setdefault("name", "frism") == "frism":
        options["steps"] = sizes.gate_steps
    settings = {"kl_budget": budget, "seed": table.trio.seed, "calibration": calibration}
    return {**table.sources, "method": {**options, **settings}}


def _gated(table: Table, method: str) -> Change:
    """Of gates; how they were learned is kept in `learned/METHOD.json`."""
    source = "FRISM donor" if method == SHUFFLED else method
    name, factors = source.replace(" ", "-"), table.folder / "factors"
    out = table.folder / f"gates-{name}"
    if not (out / "gates.json").is_file():
        with _Stages(table, name) as took:
            vg.decompose(recipe(table, source), factors, resume=True)
            took("decompose")
            gates = vg.gates(recipe(table, source), factors, out)
            took("gates")
            took.facts["settings"] = {key: value for key, value in gates.settings.items() if key != "from"}
            took.facts["log"] = list(gates.log)
    store, gates = open_store(factors), load_gates(out)
    spectra = {key: gates.spectrum(key, store[key].s) for key in gates.logits}
    if method == SHUFFLED:
        generator = torch.Generator().manual_seed(table.trio.seed)
        for key in sorted(spectra):
            opened = gates.open(key)[torch.randperm(len(gates.open(key)), generator=generator)]
            spectra[key] = gates.scale * opened * store[key].s.float()

    def at(strength: float) -> dict[str, Tensor]:
        scaled = {key: strength * spectrum for key, spectrum in spectra.items()}
        return table.changes(table.rebuilder.with_spectra(scaled, store))

    return at


def _all_weights(table: Table) -> Change:
    """Of every projection, trained in float32 with the arithmetic in bf16 where the processor has it."""
    file = table.folder / "all-weights.safetensors"
    if not file.is_file():
        source = recipe(table, "FRISM donor")
        with _Stages(table, "all-weights") as took:
            vg.decompose(source, table.folder / "factors", resume=True)
            store = open_store(table.folder / "factors")
            with distiller_for(resolve(source), store, table.folder / "all-weights", None) as (distiller, donor):
                distiller.model.float()
                took("targets")
                assert donor is not None
                with torch.autocast(distiller.model.device.type, training_dtype(), training_dtype() == torch.bfloat16):
                    trained = learn_weights(
                        distiller,
                        donor,
                        kl_budget=BUDGET,
                        steps=table.trio.sizes.gate_steps,
                        learning_rate=5e-5,
                        seed=table.trio.seed,
                    )
            took("weights")
            took.facts |= {"settings": dict(trained.settings), "log": list(trained.log)}
        save_tensors(dict(trained.weights), file)
    return _towards(table, load_file(file))


def _tuned(table: Table, method: str) -> Change:
    """Of the VLM fine-tuned on traces by the package."""
    out = table.folder / method.replace(" ", "-")
    if not out.is_dir():
        sources = {key: table.sources[key] for key in ("vlm", "donor", "donor_base")}
        arguments = {
            "max_steps": table.trio.sizes.tune_steps,
            "per_device_train_batch_size": 8,
            "learning_rate": 1e-4,  # at 1e-5, DRIFT's for 7B, plain tuning learns nothing in so few steps
            "warmup_steps": 5,
            "lr_scheduler_type": "cosine",
            "bf16": training_dtype() == torch.bfloat16,
            "use_cpu": not torch.cuda.is_available(),
            "logging_steps": 5,
            "save_steps": 20,
            "seed": table.trio.seed,
            "report_to": "none",
        }
        data = {"train": str(table.trio.folder / "data" / "traces.jsonl")}
        with _Stages(table, out.name) as took:
            done = vg.tune({**sources, "prior": PRIORS[method], "data": data, "train": arguments}, out)
            took("tune")
            took.facts |= {"settings": {"prior": PRIORS[method], "train": arguments}, "log": list(done.log)}
    with Reader(open_checkpoint(out)) as reader:
        return _towards(table, {tensor.name: reader.tensor(tensor.name) for tensor in table.alignment.merged})


def _towards(table: Table, weights: Mapping[str, Tensor]) -> Change:
    """A part of the way to these weights, by tensor name, of the projections."""
    whole = table.changes({str(tensor.role): weights[tensor.name].float() for tensor in table.alignment.merged})
    return lambda strength: {role: strength * change for role, change in whole.items()}


class _Stages:
    """Seconds of the stages of one learning, written to `learned/NAME.json` when all went well."""

    def __init__(self, table: Table, name: str) -> None:
        self.table, self.name = table, name
        self.facts: dict[str, Any] = {}
        self._last = (time.monotonic(), time.process_time())

    def __call__(self, stage: str) -> None:
        now = (time.monotonic(), time.process_time())
        seconds, processor = (round(after - before, 1) for before, after in zip(self._last, now, strict=True))
        self.facts[stage], self._last = {"seconds": seconds, "cpu seconds": processor}, now
        self.table.trio.report(f"{self.name}: {stage} {self.facts[stage]}")

    def __enter__(self) -> _Stages:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        if kind is None:
            make_folder(folder := self.table.folder / "learned")
            write_json(folder / f"{self.name}.json", self.facts)
