"""Chat templates are programs of whoever made the checkpoint: what they raise names the checkpoint."""

from __future__ import annotations

from typing import Any

import pytest

from vlmgraft.data.questions import Question
from vlmgraft.errors import CheckpointError
from vlmgraft.hf import templates
from vlmgraft.hf.templates import prompt_text, rendered

CHAT = [{"role": "user", "content": "sum 4 5"}]


def test_a_prompt_is_the_template_of_one_turn(processor: Any) -> None:
    tokenizer = processor.tokenizer
    expected = tokenizer.apply_chat_template(CHAT, tokenize=False, add_generation_prompt=True)
    assert prompt_text(tokenizer, Question("sum 4 5")) == rendered(tokenizer, CHAT) == expected


@pytest.mark.parametrize(
    "template",
    [
        "{{ 1 / 0 }}",
        "{{ 1 + 'x' }}",
        "{{ '%(x)s' % {} }}",
        "{{ 5 | dictsort }}",
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
        "{{ raise_exception('no system turn') }}",
        "{% if %}",
    ],
)
def test_a_template_that_fails_is_an_error_of_its_checkpoint(
    processor: Any, template: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = processor.tokenizer
    monkeypatch.setattr(tokenizer, "chat_template", template)
    monkeypatch.setattr(tokenizer, "name_or_path", "someone/model")
    with pytest.raises(CheckpointError, match="someone/model: its chat template cannot be rendered"):
        rendered(tokenizer, CHAT)


def test_a_template_without_end_is_stopped(processor: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(templates, "SECONDS", 0.2)
    loop = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
    monkeypatch.setattr(processor.tokenizer, "chat_template", loop)
    with pytest.raises(CheckpointError, match="TimeoutError"):
        rendered(processor.tokenizer, CHAT)
