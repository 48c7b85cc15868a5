"""One model in memory that answers without and with its gates (at a given strength) at the same time.

    W(x) = W_vlm + U diag(c(x)) Vh        c(0) = 0, c(k) = λ σ(g) ⊙ s of the k-th gates of a path, linear in between

At x = 0 every layer is the VLM's own, bit for bit. Two threads generate the two answers. They alternate forward passes
of the text model, each with its own spectra, so that both answers are streamed from one copy of the weights.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import wraps
from queue import SimpleQueue
from typing import Any

import torch
from torch import Tensor
from transformers import TextStreamer

from vlmgraft.distillation.gated_layers import GatedLayers, gated
from vlmgraft.distillation.prompts import Prompts, before_placeholders, placeholders
from vlmgraft.errors import DataError
from vlmgraft.hf.batches import Question, generate_batch
from vlmgraft.hf.modules import match_projections, text_model, tokenizer_of
from vlmgraft.hf.templates import prompt_text
from vlmgraft.spectral.factor_store import check_gates
from vlmgraft.spectral.factors import Factors
from vlmgraft.spectral.gates import Gates

MAX_CHARACTERS = 20_000
"""Maximum length of a question; the model's context is the other limit."""
SIDES = ("vlm", "injected")
Events = SimpleQueue[tuple[str, "str | Future[list[int]]"]]


@dataclass(frozen=True)
class PartialAnswer:
    """An answer so far: text without special tokens; ids of its tokens, the end token included, once it is finished."""

    text: str = ""
    ids: tuple[int, ...] = ()


@dataclass(frozen=True)
class Exchange:
    """Both answers so far. kl: once both are finished, KL(P_vlm ‖ P_injected) in nats per token of the VLM's answer,
    which `kl_budget` bounds; None before that, and if the VLM's answer has no token to measure it on."""

    vlm: PartialAnswer
    injected: PartialAnswer
    kl: float | None = None


class Session:
    """A gated model and its processor, asked at strengths from 0 to `len(path)`; created by `opened`.

    path: λ σ(g) ⊙ s by tensor name, for each of the gates. Only one question is asked at a time.
    """

    def __init__(self, model: Any, processor: Any, layers: GatedLayers, path: Sequence[Mapping[str, Tensor]]) -> None:
        self.model, self.processor, self.layers, self.path = model, processor, layers, path
        self.stop = threading.Event()
        self._turn, self._mine = threading.Lock(), threading.local()
        self._known: tuple[tuple[Question, int], PartialAnswer] | None = None

    def spectra(self, strength: float) -> dict[str, Tensor] | None:
        """c(strength) by tensor name, float32 [r]; None at 0, which is the VLM itself. Raises DataError."""
        if not 0 <= strength <= len(self.path):
            raise DataError(f"strength: {strength} must be from 0 to {len(self.path)}")
        if strength == 0:
            return None
        point = min(int(strength), len(self.path) - 1)
        below = self.path[point - 1] if point else {name: torch.zeros_like(c) for name, c in self.path[0].items()}
        return {name: torch.lerp(below[name], c, strength - point) for name, c in self.path[point].items()}

    def ask(self, question: Question, strength: float, max_new_tokens: int) -> Iterator[Exchange]:
        """Both greedy answers as they grow, and at the end the KL. A repeated question reuses the VLM's answer.

        Raises:
            DataError: an empty or too long question, a strength outside the path, or a prompt beyond the context.
        """
        if not 0 < len(question.question.strip()) <= MAX_CHARACTERS:
            raise DataError(f"question: needs 1 to {MAX_CHARACTERS:,} characters, got {len(question.question):,}")
        states, request = {"vlm": None, "injected": self._state(strength)}, (question, max_new_tokens)
        replies = dict.fromkeys(SIDES, PartialAnswer())
        if self._known is not None and self._known[0] == request:
            replies["vlm"] = self._known[1]
        events: Events = SimpleQueue()
        self.stop = stop = threading.Event()
        with ThreadPoolExecutor(len(SIDES)) as pool:
            try:
                waiting = {side for side in SIDES if not replies[side].ids}
                for side in sorted(waiting):
                    future = pool.submit(self._write, side, states[side], *request, stop, events)
                    future.add_done_callback(lambda done, side=side: events.put((side, done)))
                while waiting:
                    side, news = events.get()
                    if isinstance(news, str):
                        replies[side] = replace(replies[side], text=replies[side].text + news)
                    else:
                        replies[side] = self._finished(news.result())
                        waiting.remove(side)
                    yield Exchange(replies["vlm"], replies["injected"])
            finally:
                stop.set()
        self._known = request, replies["vlm"]
        kl = self._kl(question, replies["vlm"].ids, states["injected"])
        yield Exchange(replies["vlm"], replies["injected"], kl)

    def forward(self, inner: Any, *args: Any, **kwargs: Any) -> Any:
        """The text model's forward pass with the calling thread's spectra."""
        with self._turn:
            state = getattr(self._mine, "state", None) or [None] * len(self.layers)
            for layer, spectrum in zip(self.layers.values(), state, strict=True):
                layer.spectrum = spectrum
            return inner(*args, **kwargs)

    def _state(self, strength: float) -> list[Tensor | None]:
        """Every layer's spectrum at a strength, on the layer's device."""
        with self._turn:
            self.layers.set(self.spectra(strength))
            return [layer.spectrum for layer in self.layers.values()]

    def _write(
        self, side: str, state: Any, question: Question, limit: int, stop: threading.Event, events: Events
    ) -> list[int]:
        self._mine.state = state

        def stopped(ids: Tensor, *_: Any, **__: Any) -> Tensor:
            return torch.full((len(ids),), stop.is_set(), device=ids.device)

        stream = _Stream(tokenizer_of(self.processor), side, events)
        options = {"streamer": stream, "stopping_criteria": [stopped]}
        return generate_batch(self.model, self.processor, [question], limit, options)[0][0]

    def _finished(self, ids: Sequence[int]) -> PartialAnswer:
        text = tokenizer_of(self.processor).decode(ids, skip_special_tokens=True)
        return PartialAnswer(str(text).strip(), tuple(ids))

    @torch.no_grad()
    def _kl(self, question: Question, ids: Sequence[int], state: Any) -> float | None:
        images = placeholders(self.model)
        answer = before_placeholders(images, list(ids))
        if not answer:
            return None
        self._mine.state = None
        batch = Prompts((self.model, self.processor), [question], [answer], [[0]], images, "answer").batch(0)
        batch = replace(batch, target=batch.distribution(self.model))
        self._mine.state = state
        return float(batch.kl(self.model).mean())


class _Stream(TextStreamer):
    """Streams the text of one side as events."""

    def __init__(self, tokenizer: Any, side: str, events: Events) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.side, self.events = side, events

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        """Queue text that will not change any more."""
        self.events.put((self.side, text))


@contextmanager
def opened(model: Any, processor: Any, factors: Mapping[str, Factors], path: Sequence[Gates]) -> Iterator[Session]:
    """A session on a loaded VLM, which is restored on exit.

    path: gates on the same factors, in the order of the dial; strength k is the k-th of them, 0 the VLM.
    Raises CheckpointError and AlignmentError if gates, factors and model do not match.
    """
    for gates in path:
        check_gates(gates, factors)
    s = {name: factors[name].s.float() for name in path[0].logits}
    spectra = [{name: gates.spectrum(name, s[name]) for name in s} for gates in path]
    prompt_text(processor, Question("?"))  # here, in the main thread, a template's time and memory are bounded
    decoder = text_model(model)
    with gated(model, match_projections(model, list(s)), factors) as layers:
        session = Session(model, processor, layers, spectra)
        inner = decoder.forward
        decoder.forward = wraps(inner)(lambda *args, **kwargs: session.forward(inner, *args, **kwargs))
        try:
            yield session
        finally:
            session.stop.set()
            del decoder.forward
