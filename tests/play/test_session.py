"""A dial on one model: its two ends are the VLM and the merged folder, and nothing remains of it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch

from vlmgraft.distillation.distill import Distiller
from vlmgraft.errors import AlignmentError, CheckpointError, DataError
from vlmgraft.hf.batches import Question, generate_batch
from vlmgraft.hf.modules import match_projections, put, text_model
from vlmgraft.play import session as module
from vlmgraft.play.session import Exchange, Session, opened
from vlmgraft.spectral.gates import Gates, constant_gates

TOKENS = 12


@pytest.fixture(scope="module")
def path(factors: Any) -> list[Gates]:
    """A little and all of a task vector that is as large as the weights: the ends answer differently."""
    sizes = {name: len(one.s) for name, one in factors.items()}
    return [constant_gates(sizes, -2.0, 2.0), constant_gates(sizes, float("inf"), 3.0)]


@pytest.fixture
def session(vlm: Any, processor: Any, factors: Any, path: list[Gates]) -> Iterator[Session]:
    with opened(vlm, processor, factors, path) as session:
        yield session


def last(session: Session, question: Question, strength: float) -> Exchange:
    *_, exchange = session.ask(question, strength, TOKENS)
    return exchange


def merged_answer(vlm: Any, processor: Any, factors: Any, gates: Gates, question: Question) -> list[int]:
    """By folded weights: the update is formed and added."""
    linears = match_projections(vlm, list(factors))
    before = {
        name: put(linear, linear.weight + factors[name].update(gates.spectrum(name, factors[name].s)))
        for name, linear in linears.items()
    }
    try:
        return generate_batch(vlm, processor, [question], TOKENS)[0][0]
    finally:
        for name, weight in before.items():
            put(linears[name], weight)


def test_the_ends_of_the_dial(vlm: Any, processor: Any, factors: Any, path: list[Gates], questions: Any) -> None:
    """0 is the VLM token for token at a KL of exactly 0; a whole number is those gates, folded."""
    changed = 0
    for question in questions[:3]:
        plain = generate_batch(vlm, processor, [question], TOKENS)[0][0]
        folded = [merged_answer(vlm, processor, factors, gates, question) for gates in path]
        with opened(vlm, processor, factors, path) as session:
            ends = [last(session, question, strength) for strength in (0, 1, 2)]
        assert ends[0].kl == 0 and list(ends[0].injected.ids) == plain
        assert all(list(end.vlm.ids) == plain for end in ends)
        assert [list(end.injected.ids) for end in ends[1:]] == folded
        assert 0 < ends[1].kl < ends[2].kl
        changed += folded[1] != plain
    assert changed, "the last gates change an answer, or the test shows nothing"


def test_between_two_points_the_spectra_are_interpolated(session: Session, factors: Any, path: list[Gates]) -> None:
    name = next(iter(factors))
    first, second = (gates.spectrum(name, factors[name].s) for gates in path)
    assert session.spectra(0) is None
    for strength, expected in ((0.25, 0.25 * first), (1, first), (1.5, (first + second) / 2), (2, second)):
        assert torch.allclose(session.spectra(strength)[name], expected, rtol=1e-6)  # type: ignore[index]
    assert session.spectra(1)[name].equal(first) and session.spectra(2)[name].equal(second)  # type: ignore[index]
    for strength in (-0.1, 2.1, float("nan")):
        with pytest.raises(DataError, match="from 0 to 2"):
            session.spectra(strength)


def test_the_kl_is_the_products_own(distiller: Distiller, path: list[Gates], questions: Any) -> None:
    question = questions[1]
    with opened(distiller.model, distiller.processor, distiller.factors, path) as session:
        kl = last(session, question, 1).kl
    ruler = replace(distiller, max_new_tokens=TOKENS).teacher_targets([question])
    assert kl == pytest.approx(distiller.keep_kl(path[0], ruler), rel=1e-3)


def test_both_answers_stream_and_the_last_state_is_the_whole(session: Session, questions: Any) -> None:
    exchanges = list(session.ask(questions[0], 2.0, TOKENS))
    for side in ("vlm", "injected"):
        texts = [getattr(one, side).text for one in exchanges]
        assert len(set(texts)) > 2 and texts[-1]
        assert all(texts[-1].startswith(text.strip()) for text in texts)
        assert not getattr(exchanges[0], side).ids or not exchanges[0].vlm.ids
    assert exchanges[0].kl is None and exchanges[-1].kl is not None


def test_the_dial_does_not_ask_the_vlm_again(session: Session, questions: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    generate = module.generate_batch

    def counted(*arguments: Any) -> Any:
        asked.append(arguments[4]["streamer"].side)
        return generate(*arguments)

    monkeypatch.setattr(module, "generate_batch", counted)
    first, second = (last(session, questions[5], strength) for strength in (1, 2))
    assert sorted(asked) == ["injected", "injected", "vlm"] and first.vlm == second.vlm
    last(session, questions[6], 2)
    assert sorted(asked)[-2:] == ["vlm", "vlm"]


def test_a_failure_and_an_end_in_the_middle_leave_a_session_that_answers(session: Session, questions: Any) -> None:
    expected = last(session, questions[2], 1)
    for wrong in (Question("  "), Question("x" * (module.MAX_CHARACTERS + 1)), Question("sum " * 15_000)):
        with pytest.raises(DataError):
            last(session, wrong, 1)
    asking = session.ask(questions[3], 1, 64)
    next(asking)
    asking.close()
    assert session.stop.is_set() and last(session, questions[2], 1) == expected


def test_the_model_is_left_as_it_was(vlm: Any, processor: Any, factors: Any, path: list[Gates], questions: Any) -> None:
    modules, weights = dict(vlm.named_modules()), {name: value.clone() for name, value in vlm.state_dict().items()}
    with pytest.raises(RuntimeError, match="inside"), opened(vlm, processor, factors, path) as session:
        last(session, questions[0], 1)
        raise RuntimeError("inside")
    assert dict(vlm.named_modules()) == modules and "forward" not in vars(text_model(vlm))
    assert all(value.equal(weights[name]) for name, value in vlm.state_dict().items())


def test_gates_of_other_factors_are_refused(vlm: Any, processor: Any, factors: Any, path: list[Gates]) -> None:
    short = replace(path[0], logits={name: value[:-1] for name, value in path[0].logits.items()})
    with pytest.raises(CheckpointError, match="belong to other factors"), opened(vlm, processor, factors, [short]):
        pass
    name = next(iter(factors))
    with (
        pytest.raises(AlignmentError),
        opened(vlm, processor, {"nowhere": factors[name]}, [Gates({"nowhere": path[0].logits[name]}, 1.0)]),
    ):
        pass
