"""Donor matching on the student's own answers, and weights on an answer's format tokens, beside FRISM: what wins?

    python -m experiments.lab.on_policy --rows benchmarks/results/lab/on-policy-0.jsonl

On policy: the gated model answers the text questions anew every `refresh` steps, and is matched with the donor on those
tokens; before step `start` on the donor's own answers (arXiv 2510.23497 finds such a start essential). A coin of chance
`share` says which of both a step takes, so that a step costs as much as before. The loss is KL(donor ‖ student) as on
the donor's answers, so that only the prefixes change (arXiv 2605.16826 calls it DAgger's), or with `reverse`
KL(student ‖ donor), the terms of the KL between whole answers.

Format tokens: the KL from the VLM at chosen tokens of its own answers counts `weight` times (the idea of
arXiv 2602.22538, which projects task vectors on the null space of the features there).

Every row meets its budget on validation prompts; no setting is chosen by what it scored.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import count
from operator import eq
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from experiments.lab.beside_gates import BESIDE, SIZES, table
from experiments.lab.experiments import SCALE, Bench, Job, Row
from experiments.lab.experiments_jobs import _at, _job, _matched
from vlmgraft.distillation.distill import Distiller
from vlmgraft.distillation.prompts import Prompts, before_placeholders, placeholders
from vlmgraft.distillation.targets import DONOR_BATCH, Distribution, TargetBatch, Targets
from vlmgraft.distillation.teacher import TeacherOutputs, pack
from vlmgraft.errors import DataError
from vlmgraft.hf.batches import Question, generate_batch
from vlmgraft.hf.models import load_processor
from vlmgraft.lab import trio_path
from vlmgraft.lab.compare import LEARNING_RATE, without_answers
from vlmgraft.lab.exam import draw_exam
from vlmgraft.lab.world import Split
from vlmgraft.storage.jsonl import write_text

BUDGETS = (0.003, 0.001)
REFRESH = 8
KINDS = ("five_digits", "difference")


@dataclass(frozen=True)
class Reverse(Distribution):
    """A teacher's whole distributions (`ids` None), with KL(student ‖ teacher) as the student's divergence."""

    def to(self, device: torch.device | str) -> Reverse:
        """The same distributions elsewhere."""
        return Reverse(self.log_p.to(device), None)

    def kl(self, logits: Float[Tensor, "N vocabulary"]) -> Float[Tensor, " N"]:
        """KL(student ‖ teacher) per token in nats."""
        log_q = logits.float().log_softmax(-1)
        return (log_q.exp() * (log_q - self.log_p)).sum(-1)


@dataclass(frozen=True)
class OnPolicy(Targets):
    """The donor's answers as targets until step `start`; from there with chance `share` the student's own answers.

    The model answers as it is gated when a batch is asked for. A training with a KL budget and one batch a step sets
    the gates of that step first at every fourth one: `start` and `refresh` are multiples of it. It cannot be resumed.
    temperature 0: greedy. reverse: KL(student ‖ donor) on the student's tokens, else KL(donor ‖ student) as on the
    donor's.
    """

    distiller: Distiller
    donor: tuple[Any, Any]
    text: Sequence[Question]
    max_new_tokens: int
    share: float = 1.0
    start: int = 0
    refresh: int = REFRESH
    temperature: float = 0.0
    reverse: bool = False
    alike: list[float] = field(default_factory=list)
    """Share of the student's answers that are the donor's own, at every refresh."""

    def order(self, seed: int) -> Iterator[TargetBatch]:
        """A batch per step, without end."""
        given = own = super().order(seed)
        coins = torch.Generator().manual_seed(seed)
        for step in count():
            if self.share > 0 and step >= self.start and (step - self.start) % self.refresh == 0:
                own = self.sampled(seed + step).order(seed + step)
            heads = float(torch.rand((), generator=coins)) < self.share
            yield next(own if heads else given)

    @torch.no_grad()
    def sampled(self, seed: int) -> Targets:
        """What the model answers now, with the donor's distributions on it."""
        options = {"do_sample": True, "temperature": self.temperature} if self.temperature else {}
        student = (self.distiller.model, self.distiller.processor)
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            answers, lengths = generate_batch(*student, self.text, self.max_new_tokens, options)
        images = placeholders(student[0])
        answers = [before_placeholders(images, answer) for answer in answers]
        self.alike.append(sum(map(eq, map(tuple, answers), self.answers)) / len(answers))
        lengths = [length + len(answer) for length, answer in zip(lengths, answers, strict=True)]
        groups = pack(self.text, lengths, DONOR_BATCH, "shuffle", seed)
        donor, own = (Prompts(side, self.text, answers, groups, images, "answer") for side in (self.donor, student))
        said = [donor.batch(index, replayed=False).distribution(self.donor[0]) for index in range(len(groups))]
        if self.reverse:
            said = [Reverse(each.log_p, each.ids) for each in said]
        return TeacherOutputs(own, tuple(said), ()).targets(student)


@dataclass(frozen=True)
class Weighted(TargetBatch):
    """A batch whose mean of `kl` is a weighted one: the tokens `chosen` count `weight` times."""

    chosen: tuple[int, ...] = ()
    weight: float = 1.0

    def kl(self, model: Any) -> Float[Tensor, " N"]:
        """KL per token times its weight over the mean weight."""
        weights = self.weights().to(model.device)
        return super().kl(model) * weights / weights.mean()

    def weights(self) -> Float[Tensor, " N"]:
        """Of every token that counts."""
        predicted = self.ids.roll(-1, dims=1)[self.predicts]
        return torch.where(torch.isin(predicted, torch.tensor(self.chosen)), self.weight, 1.0)


def weighted(targets: Targets, tokens: Sequence[str], weight: float, tokenizer: Any) -> Targets:
    """Targets whose tokens of these names count `weight` times; raises DataError when no answer holds any of them."""
    chosen = tuple(tokenizer.convert_tokens_to_ids(list(tokens)))
    if not {token for answer in targets.answers for token in answer} & set(chosen):
        raise DataError(f"no answer of the teacher holds any of {', '.join(tokens)}: there is no form to keep")
    return replace(
        targets, batches=tuple(Weighted(**vars(batch), chosen=chosen, weight=weight) for batch in targets.batches)
    )


FORMS = ("<|im_end|>", "<think>", "</think>")
POLICIES: tuple[dict[str, Any], ...] = (
    {"budget": 0.003, "share": 1.0, "start": 0},
    {"budget": 0.003, "share": 1.0, "start": 24},
    {"budget": 0.003, "share": 0.5, "start": 24, "temperature": 1.0},
    {"budget": 0.003, "share": 1.0, "start": 24, "reverse": True},
    {"budget": 0.001, "share": 1.0, "start": 24},
    {"budget": 0.003, "share": 1.0, "start": 24, "questions": "five_digits"},
    {"budget": 0.003, "share": 1.0, "start": 24, "questions": "difference"},
    {"budget": 0.003, "share": 1.0, "start": 0, "questions": "five_digits"},
    {"budget": 0.003, "share": 1.0, "start": 0, "questions": "five_digits", "reverse": True},
)
"""The last two were added when the rows before them were seen."""
FORMED: tuple[dict[str, Any], ...] = (
    {"budget": 0.003, "inject": "donor", "sums": 0, "weight": 1.0},
    {"budget": 0.003, "inject": "donor", "sums": 0, "weight": 10.0},
    {"budget": 0.003, "inject": "energy", "sums": 0, "weight": 10.0},
    {"budget": 0.003, "inject": "donor", "sums": 96, "weight": 1.0},
    {"budget": 0.003, "inject": "donor", "sums": 96, "weight": 10.0},
)
"""Injection, sums among the VLM's questions, and the weight of `FORMS`."""


def on_policy(bench: Bench, setting: Mapping[str, Any]) -> Row:
    """The row of one training with donor matching on the student's own answers."""
    comparison, distiller, options = bench.comparison, bench.distiller(), dict(setting)
    budget, kind = options.pop("budget"), options.pop("questions", "sum")
    donor, questions = (comparison.donor, load_processor(comparison.trio / "donor")), comparison.text_questions(kind)
    given = distiller.donor_targets(*donor, questions)
    longest = distiller.max_new_tokens
    targets = OnPolicy(
        **vars(given), distiller=distiller, donor=donor, text=questions, max_new_tokens=longest, **options
    )
    row = learned(bench, distiller, "donor", targets, budget)
    row["notes"]["alike"] = targets.alike
    return row


def formed(bench: Bench, setting: Mapping[str, Any]) -> Row:
    """The row of one training whose VLM is kept at an answer's form; `sums`: so many among its questions. The notes
    have the KL at the form of its answers to other sums."""
    distiller, tokenizer = bench.distiller(), bench.comparison.processor.tokenizer
    given, others = (_sums(bench, split, setting["sums"] or 96) for split in ("calibration", "validation"))
    form = distiller.teacher_targets(others)
    if setting["sums"]:
        distiller.targets = distiller.teacher_targets([*bench.comparison.calibration, *given])
    distiller.targets = weighted(distiller.targets, FORMS, setting["weight"], tokenizer)
    donor = bench.donor if setting["inject"] == "donor" else None
    return learned(bench, distiller, setting["inject"], donor, setting["budget"], form)


def _sums(bench: Bench, split: Split, count: int) -> tuple[Question, ...]:
    comparison = bench.comparison
    return without_answers(draw_exam(comparison.seed, split, {"sum": count}, glyphs=comparison.glyphs))


def learned(
    bench: Bench, distiller: Distiller, inject: str, donor: Targets | None, budget: float, form: Targets | None = None
) -> Row:
    """Gates at λ = 1, trained as FRISM's of `experiments_jobs`, and measured; form: answers at whose form, too."""
    settings: dict[str, Any] = {"steps": bench.sizes.steps, "learning_rate": LEARNING_RATE, "seed": 0}
    gates = distiller.learn(SCALE, inject=inject, donor=donor, kl_budget=budget, **settings)
    notes = {key: gates.settings[key] for key in ("inject_weight", "energy", "held_out_kl", "landing")}
    if form is not None:
        tokenizer = bench.comparison.processor.tokenizer
        with distiller.applied(gates) as model:
            notes["form_kl"] = form_kl(model, weighted(form, FORMS, 2.0, tokenizer))
    return bench.measure(bench.matrices(gates), notes=notes)


def form_kl(model: Any, form: Targets) -> float:
    """Mean KL at the tokens of weighted targets that count more than others, nats per token."""
    batches = [batch for batch in form.batches if isinstance(batch, Weighted)]
    heavy = [batch.target.kl(batch.logits(model))[batch.weights() > 1] for batch in batches]
    return float(torch.cat(heavy).double().mean())


def tables(rows: Sequence[Row]) -> str:
    """A table for every budget and kind of text questions, as that of core gates."""
    groups: dict[tuple[float, str], list[Row]] = {}
    for row in rows:
        groups.setdefault((row["setting"]["budget"], row["setting"].get("questions", "sum")), []).append(row)
    titles = {group: f"{group[0]} nats per token, text questions: {group[1]}" for group in groups}
    return "\n".join(f"{titles[group]}\n\n{table(groups[group])}" for group in sorted(groups, reverse=True))


def jobs(bench: Bench) -> list[Job]:
    """The rows: FRISM, donor matching with questions of other kinds than the test's, and all settings."""
    listed = [job for job in _at(bench, BUDGETS[0]) if job.method in BESIDE]
    listed += [job for job in _at(bench, BUDGETS[1]) if job.method in BESIDE[1:]]
    for kind in KINDS:
        setting = {"budget": BUDGETS[0], "questions": kind}
        listed.append(_job(bench, BESIDE[-1], setting, _matched(bench, kind, BUDGETS[0])))
    listed += [Job("on policy", setting, partial(on_policy, bench, setting)) for setting in POLICIES]
    return listed + [Job("format tokens", setting, partial(formed, bench, setting)) for setting in FORMED]


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=Path, required=True)
    path, bench = parser.parse_args().rows, Bench(trio_path(), SIZES)
    write_text(path.with_suffix(".md"), tables(bench.run(jobs(bench), path)))


if __name__ == "__main__":
    main()
