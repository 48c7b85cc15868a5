"""Asking a model: in batches with transformers, or with vLLM if it is installed; both return `Answer`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from vlmgraft.errors import CheckpointError, InputError, VlmgraftError
from vlmgraft.hf.batches import Question, generate_batch, planned_lengths
from vlmgraft.hf.modules import tokenizer_of
from vlmgraft.hf.templates import prompt_text


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen; temperature 0 is greedy. max_new_tokens bounds every answer."""

    max_new_tokens: int = 1024
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0


@dataclass(frozen=True)
class Answer:
    """One answer. text: without special tokens. tokens: their number, with the end token. cut: whether the token limit
    ended it. prompt: as the model read it, with placeholders for images."""

    text: str
    tokens: int
    cut: bool
    prompt: str
    prompt_tokens: int


class Engine(Protocol):
    """Anything that answers a batch of questions."""

    name: str

    def answer(self, questions: Sequence[Question], seed: int) -> list[Answer]:
        """Answers in the order of the questions; raises VlmgraftError, torch.OutOfMemoryError."""
        ...

    def lengths(self, questions: Sequence[Question]) -> Sequence[int]:
        """The number of tokens of every prompt, for planning batches; empty if the engine does its own batching."""
        ...


class TransformersEngine:
    """`generate` on a model in memory and its processor (or, for a text model, its tokenizer)."""

    name = "transformers"

    def __init__(self, model: Any, processor: Any, sampling: Sampling) -> None:
        self.model, self.processor, self.sampling = model, processor, sampling
        ends = model.generation_config.eos_token_id
        self.ends = {ends} if isinstance(ends, int) else set(ends or [])

    def answer(self, questions: Sequence[Question], seed: int) -> list[Answer]:
        """Answer one batch, in which either all questions have images or none has."""
        limit, options = self.sampling.max_new_tokens, {}
        if self.sampling.temperature > 0:
            options = {"do_sample": True, "temperature": self.sampling.temperature, "top_p": self.sampling.top_p}
            torch.manual_seed(seed)
        rows, lengths = generate_batch(self.model, self.processor, questions, limit, options)
        decode = tokenizer_of(self.processor).decode
        return [
            Answer(
                text=str(decode(row, skip_special_tokens=True)).strip(),
                tokens=len(row),
                cut=len(row) >= limit and row[-1] not in self.ends,
                prompt=prompt_text(self.processor, question),
                prompt_tokens=length,
            )
            for row, length, question in zip(rows, lengths, questions, strict=True)
        ]

    def lengths(self, questions: Sequence[Question]) -> list[int]:
        """Counted by the processor; empty if its chat template fails, an error that `answer` will report."""
        try:
            return planned_lengths(self.processor, questions)
        except CheckpointError:
            return []


class VllmEngine:
    """vLLM's offline engine on a folder or hub id; it batches by itself, so batches may be large."""

    name = "vllm"

    def __init__(self, model: str | Path, processor: Any, sampling: Sampling, **options: Any) -> None:
        try:
            from vllm import LLM, SamplingParams
        except ImportError as error:
            raise InputError(
                "--engine vllm: vLLM is not installed; pip install 'vlmgraft[vllm]', or --engine transformers"
            ) from error
        self.processor, self.sampling, self._params = processor, sampling, SamplingParams
        self.llm = LLM(model=str(model), **options)

    def answer(self, questions: Sequence[Question], seed: int) -> list[Answer]:
        """One call of `generate`; sampled answers depend on the seed, not on what else is asked."""
        prompts = [prompt_text(self.processor, question) for question in questions]
        requests = [
            {"prompt": prompt, **({"multi_modal_data": {"image": list(question.images)}} if question.images else {})}
            for prompt, question in zip(prompts, questions, strict=True)
        ]
        params = self._params(
            max_tokens=self.sampling.max_new_tokens,
            temperature=self.sampling.temperature,
            top_p=self.sampling.top_p,
            seed=seed,
        )
        try:
            results = self.llm.generate(requests, params, use_tqdm=False)
        except (ValueError, RuntimeError, IndexError) as error:  # too long a prompt, an image that is refused
            raise VlmgraftError(str(error) or repr(error)) from error
        outputs = [(result, result.outputs[0]) for result in results]
        return [
            Answer(
                output.text.strip(),
                len(output.token_ids),
                output.finish_reason == "length",
                prompt,
                len(result.prompt_token_ids),
            )
            for prompt, (result, output) in zip(prompts, outputs, strict=True)
        ]

    def lengths(self, questions: Sequence[Question]) -> tuple[int, ...]:
        """Empty: vLLM does its own batching."""
        return ()
