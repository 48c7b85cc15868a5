"""Donor matching on the student's own answers, and weights on format tokens: losses by hand, and whose answers."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from experiments.lab.on_policy import OnPolicy, form_kl, tables, weighted
from vlmgraft.distillation.distill import Distiller
from vlmgraft.distillation.targets import Targets
from vlmgraft.errors import DataError
from vlmgraft.hf.batches import Question, encode, generate_batch
from vlmgraft.spectral.gates import Gates, constant_gates
from vlmgraft.storage.jsonl import read_rows

TEXT = [Question(f"sum {i} {i + 3} red {i + 1}") for i in range(6)]
LONGEST = 6


@pytest.fixture(scope="module")
def given(distiller: Distiller, donor: Any, processor: Any) -> Targets:
    return distiller.donor_targets(donor, processor.tokenizer, TEXT, batch_size=4)


def policy(distiller: Distiller, donor: Any, given: Targets, **options: Any) -> OnPolicy:
    side = (donor, distiller.processor.tokenizer)
    return OnPolicy(**vars(given), distiller=distiller, donor=side, text=TEXT, max_new_tokens=LONGEST, **options)


def opened(distiller: Distiller, logit: float) -> Gates:
    return constant_gates({name: len(factors.s) for name, factors in distiller.factors.items()}, logit, 2.0)


def test_the_answers_are_those_of_the_model_as_it_is_gated(distiller: Distiller, donor: Any, given: Targets) -> None:
    """Against weights that are merged by hand; neither the VLM's own answers nor the donor's."""
    gates = opened(distiller, 1.0)
    share = 2.0 / (1 + math.exp(-1.0))
    merged = {n: distiller.linears[n].weight.detach() + share * f.update() for n, f in distiller.factors.items()}
    with distiller.applied(merged) as model:
        expected = generate_batch(model, distiller.processor, TEXT, LONGEST)[0]
    plain = generate_batch(distiller.model, distiller.processor, TEXT, LONGEST)[0]
    with distiller.applied(gates):
        sampled = policy(distiller, donor, given).sampled(0)
    assert [list(answer) for answer in sampled.answers] == expected
    assert expected != plain and sampled.answers != given.answers


@pytest.mark.parametrize("reverse", [False, True])
def test_the_loss_is_the_divergence_written_out(
    distiller: Distiller, donor: Any, given: Targets, reverse: bool
) -> None:
    """One question at a time, without padding, from both models' logits in float64."""
    with distiller.applied(opened(distiller, 0.5)) as model, torch.no_grad():
        sampled = policy(distiller, donor, given, reverse=reverse).sampled(0)
        found = torch.cat([batch.kl(model) for batch in sampled.batches]).double()
        expected = []
        for question, answer in zip(TEXT, sampled.answers, strict=True):
            logs = []
            for side, reads in ((donor, distiller.processor.tokenizer), (model, distiller.processor)):
                prompt = prompt_of(reads, question)
                logits = side(input_ids=torch.tensor([[*prompt, *answer]])).logits[0].double()
                logs.append(logits[len(prompt) - 1 : len(prompt) + len(answer) - 1].log_softmax(-1))
            p, q = reversed(logs) if reverse else logs
            expected.append((p.exp() * (p - q)).sum(-1))
    assert found.sort().values.tolist() == pytest.approx(torch.cat(expected).sort().values.tolist(), rel=1e-3, abs=1e-6)
    assert len(found) == sum(map(len, sampled.answers)) and found.min() > 0


def prompt_of(reads: Any, question: Question) -> list[int]:
    ids: list[int] = encode(reads, [question])["input_ids"][0].tolist()
    return ids


def test_the_start_is_warm_and_answers_are_refreshed(distiller: Distiller, donor: Any, given: Targets) -> None:
    """The donor's answers for two steps, then the student's: of the gates then, until four steps later."""
    order = policy(distiller, donor, given, start=2, refresh=4).order(5)
    with distiller.gated() as layers, torch.no_grad():
        batches = []
        for step in range(8):
            gates = opened(distiller, 1.0 if step < 5 else -math.inf)
            layers.set({name: gates.spectrum(name, distiller.factors[name].s) for name in distiller.factors})
            batches.append(next(order))
    assert [batch is warm for batch, warm in zip(batches, given.order(5), strict=False)][:3] == [True, True, False]
    closed = {tuple(answer) for answer in generate_batch(distiller.model, distiller.processor, TEXT, LONGEST)[0]}
    with distiller.applied(opened(distiller, 1.0)) as model:
        ajar = {tuple(answer) for answer in generate_batch(model, distiller.processor, TEXT, LONGEST)[0]}
    assert closed != ajar
    assert replies(batches[2:6]) <= ajar and replies(batches[6:]) <= closed


def replies(batches: list[Any]) -> set[tuple[int, ...]]:
    """The answers that count in these batches."""
    found = set()
    for batch in batches:
        for ids, counts in zip(batch.ids.roll(-1, dims=1), batch.predicts, strict=True):
            found.add(tuple(ids[counts].tolist()))
    return found


def test_a_coin_says_whose_answers_a_step_takes(distiller: Distiller, donor: Any, given: Targets) -> None:
    known = {id(batch) for batch in given.batches}
    order = policy(distiller, donor, given, share=0.3, refresh=1000).order(1)
    taken = [id(next(order)) in known for _ in range(200)]
    assert 0.6 < sum(taken) / 200 < 0.8


@pytest.mark.parametrize("option", [{"share": 0.0}, {"start": 3}])
def test_without_own_answers_the_gates_are_those_of_donor_matching(
    distiller: Distiller, donor: Any, given: Targets, option: dict[str, float]
) -> None:
    settings: dict[str, Any] = {"inject": "donor", "inject_weight": 1.0, "steps": 3}
    plain = distiller.learn(donor=given, **settings)
    same = distiller.learn(donor=policy(distiller, donor, given, **option), **settings)
    assert all(logits.equal(same.logits[name]) for name, logits in plain.logits.items())
    own = distiller.learn(donor=policy(distiller, donor, given), **settings)
    assert not all(logits.equal(own.logits[name]) for name, logits in plain.logits.items())


def test_samples_are_seeded_and_leave_the_generator_alone(distiller: Distiller, donor: Any, given: Targets) -> None:
    warm = policy(distiller, donor, given, temperature=1.0)
    before = torch.get_rng_state()
    assert warm.sampled(1).answers == warm.sampled(1).answers != warm.sampled(2).answers
    assert torch.get_rng_state().equal(before)


def test_format_tokens_count_their_weight(distiller: Distiller) -> None:
    """Against means written out, token by token: of all, weighted, and of those tokens alone."""
    tokenizer, chosen = distiller.processor.tokenizer, distiller.targets.answers[0][0]
    heavy = weighted(distiller.targets, [tokenizer.convert_ids_to_tokens(chosen)], 10.0, tokenizer)
    alone: list[float] = []
    with distiller.applied(opened(distiller, 0.0)) as model, torch.no_grad():
        for plain, batch in zip(distiller.targets.batches, heavy.batches, strict=True):
            total = weights = 0.0
            rows, columns = plain.predicts.nonzero(as_tuple=True)
            for kl, row, column in zip(plain.kl(model).tolist(), rows, columns, strict=True):
                weight = 10.0 if int(plain.ids[row, column + 1]) == chosen else 1.0
                total, weights = total + weight * kl, weights + weight
                alone += [kl] if weight > 1 else []
            assert float(batch.kl(model).mean()) == pytest.approx(total / weights, rel=1e-5)
        assert form_kl(model, heavy) == pytest.approx(sum(alone) / len(alone), rel=1e-5)
    assert 0 < len(alone) < distiller.targets.tokens


def test_an_answer_without_the_form_is_refused(distiller: Distiller) -> None:
    with pytest.raises(DataError, match=r"no answer of the teacher holds any of <\|vision_end\|>"):
        weighted(distiller.targets, ["<|vision_end|>"], 10.0, distiller.processor.tokenizer)


def test_the_tables_are_those_of_their_rows() -> None:
    rows = Path(__file__).parents[2] / "benchmarks" / "results" / "lab" / "on-policy-0.jsonl"
    _, *measured = read_rows(rows)
    assert tables(measured) == rows.with_suffix(".md").read_text(encoding="utf-8")
