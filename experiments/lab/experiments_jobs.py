"""What the experiments measure: a list of jobs per question, each made for a `Bench`.

Every setting is fixed beforehand or chosen on validation questions; test questions are only reported on.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor

from experiments.lab.all_weights import learn_weights
from experiments.lab.experiments import SCALE, Bench, Job, Matrices, Row, truncated
from experiments.lab.experiments_budgets import front, landing, scatter
from vlmgraft.distillation.curvature import curvature_gates, curvature_start
from vlmgraft.hf.models import load_processor
from vlmgraft.methods import spectral as rules
from vlmgraft.spectral.gates import Gates

SCALES = (0.125, 0.25, 0.375, 0.5, 0.75, 1.0)
RANKS = (1, 4, 16, 64)
ENERGY_WEIGHTS = (0.01, 0.1, 1.0)
DONOR_WEIGHTS = (0.3, 3.0, 30.0)
KINDS = ("sum", "small_digits", "five_digits", "difference", "numbers", "fact", "read")
"""Text questions for donor matching; "read" has nothing to do with reasoning."""
ALL_WEIGHTS_RATES = (1e-4, 5e-4)
Maker = Callable[[], tuple[Matrices, Mapping[str, Any]]]


def curve(bench: Bench, budgets: Sequence[float]) -> list[Job]:
    """The VLM and task arithmetic over λ: the curve that others are held against."""
    comparison = bench.comparison
    jobs = [Job("VLM", {}, lambda: bench.measure(None, transfer=True))]
    for scale in SCALES:
        jobs.append(_job(bench, "task arithmetic", {"scale": scale}, _plain(comparison.task_arithmetic, scale)))
    return jobs


def table(bench: Bench, budgets: Sequence[float]) -> list[Job]:
    """Every method at every budget, and FRISM as published with α 0.1."""
    jobs = curve(bench, budgets)
    jobs.append(_job(bench, "FRISM (energy)", {"inject_weight": 0.1}, _learned(bench, "energy", inject_weight=0.1)))
    for budget in budgets:
        jobs += _at(bench, budget)
    return jobs


def _at(bench: Bench, budget: float) -> list[Job]:
    """The rows of the table at one budget."""
    setting = {"budget": budget}
    curved = {soft: _curvature(bench, budget, soft) for soft in (False, True)}

    def start() -> Gates:
        return curvature_start(bench.distiller(), SCALE, budget, curvature=bench.curvature)

    jobs = [
        _job(bench, "task arithmetic", setting, _ruled(bench, budget, lambda s: s), transfer=True),
        _job(bench, "FRISM (KL budget)", setting, _learned(bench, "energy", kl_budget=budget), transfer=True),
        _job(bench, "FRISM (donor matching)", setting, _learned(bench, "donor", kl_budget=budget), transfer=True),
        _job(bench, "curvature, hard gates", setting, _folded(bench, curved[False])),
        _job(bench, "curvature, soft gates", setting, _folded(bench, curved[True])),
    ]
    for inject, label in (("energy", "energy"), ("donor", "donor matching")):
        learn = _learned(bench, inject, kl_budget=budget, start=start)
        jobs.append(_job(bench, f"curvature start, {label}", setting, learn))
    for granularity in ("matrix", "layer"):
        for inject, label in (("energy", "energy"), ("donor", "donor matching")):
            learn = _learned(bench, inject, kl_budget=budget, granularity=granularity)
            jobs.append(_job(bench, f"one gate per {granularity}, {label}", setting, learn))
    jobs.append(Job("all weights, donor matching", setting, lambda: _all_weights(bench, budget)))
    return jobs


def questions(bench: Bench, budgets: Sequence[float]) -> list[Job]:
    """Donor matching with questions of other kinds, and what every result does on tasks it was not made for."""
    jobs = [Job("donor, told in text", {}, bench.donor_row), *curve(bench, budgets)]
    for budget in budgets:
        jobs += [job for job in _at(bench, budget) if job.method in TRANSFERRED]
        for kind in KINDS[1:]:
            setting = {"budget": budget, "questions": kind}
            jobs.append(_job(bench, "FRISM (donor matching)", setting, _matched(bench, kind, budget), transfer=True))
    return jobs


TRANSFERRED = ("task arithmetic", "FRISM (KL budget)", "FRISM (donor matching)")


def rank(bench: Bench, budgets: Sequence[float]) -> list[Job]:
    """FRISM on the first k singular directions of every matrix, and on all."""
    jobs = curve(bench, budgets)
    for budget in budgets:
        jobs += [job for job in _at(bench, budget) if job.method in TRANSFERRED]
        for count in RANKS:
            for inject, label in (("energy", "FRISM (KL budget)"), ("donor", "FRISM (donor matching)")):
                setting = {"budget": budget, "rank": count}
                jobs.append(_job(bench, label, setting, _learned(bench, inject, count, kl_budget=budget)))
    return jobs


def weight(bench: Bench, budgets: Sequence[float]) -> list[Job]:
    """FRISM at λ = 1 over the weight α of either injection term."""
    jobs = curve(bench, budgets)
    for inject, label, weights in (
        ("energy", "FRISM (energy)", ENERGY_WEIGHTS),
        ("donor", "FRISM (donor matching)", DONOR_WEIGHTS),
    ):
        for alpha in weights:
            jobs.append(_job(bench, label, {"inject_weight": alpha}, _learned(bench, inject, inject_weight=alpha)))
    return jobs


SPECTRA: dict[str, Callable[[Tensor], Tensor]] = {
    "truncate 8": lambda s: rules.truncate(s, 8),
    "truncate 32": lambda s: rules.truncate(s, 32),
    "rank one, norm-matched": lambda s: rules.rank_k(s, 1),
    "rank 8, norm-matched": lambda s: rules.rank_k(s, 8),
    "STAR η 0.4": lambda s: rules.star(s, 0.4),
    "STAR η 0.8": lambda s: rules.star(s, 0.8),
    "Iso-C": rules.iso,
}


def spectra(bench: Bench, budgets: Sequence[float]) -> list[Job]:
    """Other spectra on the same factors, untrained, each with the λ that meets the budget."""
    jobs = curve(bench, budgets)
    for budget in budgets:
        for name, rule in SPECTRA.items():
            jobs.append(_job(bench, name, {"budget": budget}, _ruled(bench, budget, rule)))
    return jobs


EXPERIMENTS = {each.__name__: each for each in (table, questions, rank, weight, spectra, front, scatter, landing)}


def _job(bench: Bench, method: str, setting: Mapping[str, Any], make: Maker, transfer: bool = False) -> Job:
    def run() -> Row:
        weights, notes = make()
        return bench.measure(weights, transfer, notes)

    return Job(method, setting, run)


def _plain(make: Callable[..., Matrices], *arguments: Any) -> Maker:
    return lambda: (make(*arguments), {})


def _ruled(bench: Bench, budget: float, rule: Callable[[Tensor], Tensor]) -> Maker:
    factors = bench.comparison.factors
    return lambda: bench.at_budget({name: f.update(rule(f.s)) for name, f in factors.items()}, budget)


def _learned(bench: Bench, inject: str, rank: int | None = None, **settings: Any) -> Maker:
    """Gates learned with the settings; `start` may be a function that makes them."""

    def make() -> tuple[Matrices, Mapping[str, Any]]:
        factors = None if rank is None else truncated(bench.comparison.factors, rank)
        started = settings["start"]() if "start" in settings else 0.0
        gates = bench.learn(inject, factors, **(settings | {"start": started}))
        return bench.matrices(gates, factors), _notes(gates)

    return make


def _matched(bench: Bench, kind: str, budget: float) -> Maker:
    def make() -> tuple[Matrices, Mapping[str, Any]]:
        comparison = bench.comparison
        processor = load_processor(comparison.trio / "donor")
        questions = comparison.text_questions(kind)
        donor = comparison.distiller.donor_targets(comparison.donor, processor, questions)
        return _learned(bench, "donor", kl_budget=budget, donor=donor)()

    return make


def _curvature(bench: Bench, budget: float, soft: bool) -> Callable[[], Gates]:
    return lambda: curvature_gates(bench.distiller(), SCALE, budget, curvature=bench.curvature, soft=soft)


def _folded(bench: Bench, make: Callable[[], Gates]) -> Maker:
    def fold() -> tuple[Matrices, Mapping[str, Any]]:
        gates = make()
        return bench.matrices(gates), _notes(gates)

    return fold


def _notes(gates: Gates) -> dict[str, Any]:
    return {key: gates.settings[key] for key in ("inject_weight", "energy", "held_out_kl") if key in gates.settings}


def _all_weights(bench: Bench, budget: float) -> Row:
    """Started where gates start, at task arithmetic with λ/2; the learning rate is chosen on validation sums."""
    comparison = bench.comparison
    scored = []
    for rate in ALL_WEIGHTS_RATES:
        settings: dict[str, Any] = {"kl_budget": budget, "steps": bench.sizes.steps, "learning_rate": rate}
        start = comparison.task_arithmetic(SCALE / 2)
        trained = learn_weights(bench.distiller(), bench.donor, start, **settings)
        met = trained.settings["held_out_kl"] <= 1.25 * budget
        solved = comparison.mark(comparison.validation, dict(trained.weights)).reasoning.mean
        scored.append(((met, solved), trained, rate))
    _, best, rate = max(scored, key=lambda each: each[0])
    notes = {"learning_rate": rate, "inject_weight": best.settings["inject_weight"]}
    return bench.measure(dict(best.weights), notes=notes)
