"""Prompts from a checkpoint's chat template, which is an untrusted program.

transformers runs it in Jinja's sandbox: it cannot read attributes that begin with an underscore or change its
arguments, and a range has at most 100,000 numbers. Nested loops and texts that double are stopped by limits of CPU time
and memory.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from jinja2 import TemplateError

from vlmgraft.errors import CheckpointError
from vlmgraft.hf.modules import tokenizer_of
from vlmgraft.storage.resources import bounded

if TYPE_CHECKING:
    from vlmgraft.data.questions import Question

SECONDS = 10.0
"""CPU time for one prompt: thousands of times that of templates with thousands of turns."""
MEMORY = 2 << 30
"""Bytes that one prompt may take in addition to the process's own."""
TEMPLATE_FAILURES = (
    TemplateError,
    ArithmeticError,  # 1 / 0
    AttributeError,  # 5 | dictsort
    LookupError,  # '%(x)s' % {}
    MemoryError,
    RecursionError,  # a macro that calls itself
    TimeoutError,
    TypeError,  # 1 + 'x'
    ValueError,  # no template, or '%d' % 'x'
)
"""What a template can raise, since it is a program; only transformers' call runs where these are caught."""


def prompt_text(processor: Any, question: Question) -> str:
    """The prompt of one question, images as the template's placeholders; raises CheckpointError as `rendered`."""
    content = question.prompt if tokenizer_of(processor) is processor else question.parts
    return rendered(processor, [{"role": "user", "content": content}])


def rendered(processor: Any, chat: Sequence[Mapping[str, Any]]) -> str:
    """The prompt of a chat, up to where the model's answer begins.

    Raises:
        CheckpointError: the template fails, or takes longer than `SECONDS` or more than `MEMORY`.
    """
    messages = list(chat)
    try:
        with bounded(SECONDS, MEMORY):
            prompt = processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    except TEMPLATE_FAILURES as error:
        raise CheckpointError(
            f"{tokenizer_of(processor).name_or_path}: its chat template cannot be rendered ({type(error).__name__}: "
            f"{error!s:.200}); take another release, or mend chat_template.jinja"
        ) from error
    return str(prompt)
