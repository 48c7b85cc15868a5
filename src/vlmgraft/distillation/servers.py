"""Servers that answer in a teacher's place: which ones, whether they are up, and whether they serve the same model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from vlmgraft.data.endpoint import Endpoint, Reply
from vlmgraft.data.questions import Question
from vlmgraft.errors import DataError, InputError, RecipeError, VlmgraftError
from vlmgraft.hf.batches import prompt_lengths
from vlmgraft.hf.modules import tokenizer_of
from vlmgraft.methods.frism import Frism, GatedMethod

if TYPE_CHECKING:
    from vlmgraft.distillation.cache import UnitCache
    from vlmgraft.distillation.prompts import Prompts
    from vlmgraft.distillation.targets import Distribution
    from vlmgraft.recipe.model import Recipe

OWN, LONG_ENOUGH = 0.5, 8
"""Least share of tokens that must be the teacher's own greedy choice, over a batch and within each answer of at least
`LONG_ENOUGH` tokens; nearly 1 for the teacher's own answers, except for ties."""
Generate = Callable[[Sequence[Question]], tuple[list[list[int]], list[int]]]
"""Questions → the answers' token ids, and the prompts' lengths in tokens."""


def vlm_endpoint(recipe: Recipe, method: GatedMethod, path: Path) -> Endpoint | None:
    """The server that answers in the VLM's place, if any; it is not contacted yet."""
    url = method.calibration.endpoint
    return Endpoint(url, names=(recipe.vlm, str(path))) if url else None


def donor_endpoints(recipe: Recipe, method: GatedMethod, paths: Sequence[Path]) -> list[Endpoint | None]:
    """The server of every donor, or None for each; raises RecipeError unless there is one per donor."""
    given = method.donor_endpoint if isinstance(method, Frism) else None
    if given is None:
        return [None] * len(paths)
    urls = given if isinstance(given, list) else [given]
    if len(urls) != len(paths):
        raise RecipeError(f"method.donor_endpoint: {len(urls)} servers for {len(paths)} donors; give one per donor")
    names = [recipe.donor, *(more.donor for more in recipe.more_donors)]
    return [Endpoint(url, names=(name, str(path))) for url, name, path in zip(urls, names, paths, strict=True)]


def check_servers(recipe: Recipe, method: GatedMethod, vlm: Path, donors: Sequence[Path]) -> None:
    """Raise InputError if a server is down, or does not serve the recipe's model."""
    for endpoint in (vlm_endpoint(recipe, method, vlm), *donor_endpoints(recipe, method, donors)):
        try:
            _ = endpoint and endpoint.serving()
        except VlmgraftError as error:
            raise InputError(str(error)) from error


def served(teacher: tuple[Any, Any], max_new_tokens: int, endpoint: Endpoint) -> Generate:
    """Answers from a server; a reply without token ids is encoded by the teacher's tokenizer."""
    tokenizer, rows = tokenizer_of(teacher[1]), len(teacher[0].get_input_embeddings().weight)
    end, server = tokenizer.eos_token_id, endpoint

    def ids(reply: Reply) -> list[int]:
        if reply.tokens is not None:
            if not all(0 <= token < rows for token in reply.tokens):
                raise DataError(f"{endpoint.url}: replied token ids that the model has not; serve the recipe's model")
            return reply.tokens
        read = tokenizer.encode(reply.text, add_special_tokens=False)
        return read + [end] * (reply.ended and end is not None and read[-1:] != [end])

    def generate(questions: Sequence[Question]) -> tuple[list[list[int]], list[int]]:
        nonlocal server
        server = server.serving()  # contacted only when an answer is missing
        replies = server.answer(questions, max_new_tokens)
        lengths = [reply.prompt_tokens for reply in replies]
        if not all(lengths):
            lengths = prompt_lengths(teacher[1], questions)
        return [ids(reply)[:max_new_tokens] for reply in replies], lengths

    return generate


def check_own(prompts: Prompts, index: int, target: Distribution, endpoint: Endpoint, units: UnitCache) -> None:
    """Check that served answers are what the teacher itself would choose; else remove the cached answers and raise
    DataError."""
    ids, predicts, answered = prompts.answered(index)
    rows = answered[predicts]  # which distributions are of answer tokens
    answer_tokens, log_p = ids.roll(-1, dims=1)[answered], target.log_p[rows].cpu()
    if target.ids is None:
        chosen = log_p.argmax(-1)
    else:
        chosen = target.ids[rows].cpu().gather(1, log_p[:, :-1].argmax(-1)[:, None])[:, 0]
    own, of_answer = (chosen == answer_tokens).float(), answered.nonzero()[:, 0]
    counts = torch.bincount(of_answer, minlength=len(ids))
    shares = torch.bincount(of_answer, own, len(ids)) / counts.clamp_min(1)
    shares = torch.cat([shares[counts >= LONG_ENOUGH], own.mean()[None]])
    if float(shares.min()) < OWN:
        units.remove()
        raise DataError(
            f"{endpoint.url}: only {float(shares.min()):.0%} of an answer's tokens are what the recipe's model would "
            "choose; serve the same weights, with its chat template and without sampling"
        )
