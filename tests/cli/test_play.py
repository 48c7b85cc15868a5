"""The command `play`: what it needs, and what it serves."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest


def test_a_missing_gradio_is_named_before_anything_is_read(
    vlmgraft: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "gradio", None)
    ran = vlmgraft("play", "no-model", "--gates", "none", "--factors", "none")
    assert ran.code == 2 and "pip install 'vlmgraft[play]'" in ran.err


def test_the_address_is_shown_and_options_reach_the_page(
    vlmgraft: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With its own folder for pictures and nothing told to gradio's makers; Ctrl-C ends it."""
    gates, shown = {"0.01": object(), "0.5": object()}, list[Any]()

    @contextmanager
    def served(*args: Any) -> Iterator[str]:
        shown.extend([*args, os.environ["GRADIO_ANALYTICS_ENABLED"], Path(os.environ["GRADIO_TEMP_DIR"]).is_dir()])
        yield "http://127.0.0.1:7861"

    def interrupted() -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("vlmgraft.analysis.eval_data.open_vlm", lambda model: (f"model {model}", "processor"))
    monkeypatch.setattr("vlmgraft.spectral.factor_store.open_store", lambda factors: f"store {factors}")
    monkeypatch.setattr(import_module("vlmgraft.distillation.front"), "read_path", lambda folder: gates)
    monkeypatch.setattr("vlmgraft.play.session.opened", lambda *given: nullcontext(given))
    monkeypatch.setattr("vlmgraft.play.page.require_gradio", lambda: None)
    monkeypatch.setattr("vlmgraft.play.page.served", served)
    waiting = SimpleNamespace(Event=lambda: SimpleNamespace(wait=interrupted))
    monkeypatch.setattr(import_module("vlmgraft.cli.play"), "threading", waiting)
    words = ("play", "m", "--gates", "g", "--factors", "f", "--max-new-tokens", 9, "--host", "0.0.0.0", "--port", 7861)
    ran = vlmgraft(*words, "-q")
    assert (ran.code, ran.out) == (130, "http://127.0.0.1:7861  (Ctrl-C ends it)\n")
    session = ("model m", "processor", "store f", list(gates.values()))
    assert shown == [session, ["0.01", "0.5"], 9, "0.0.0.0", 7861, "False", True]
    assert "GRADIO_TEMP_DIR" not in os.environ
