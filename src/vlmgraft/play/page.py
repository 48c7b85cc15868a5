"""The page: a picture, a question, a dial, and two answers that are streamed side by side.

gradio serves it from its own files alone: no font or script is loaded from another machine, and no usage data are sent.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from vlmgraft.data.images import LARGEST_FILE, open_picture
from vlmgraft.errors import InputError, VlmgraftError
from vlmgraft.hf.batches import Question
from vlmgraft.play.session import MAX_CHARACTERS, Session

MISSING = "play: gradio is not installed; pip install 'vlmgraft[play]'"


def require_gradio() -> Any:
    """The library; raises InputError naming the extra where it is missing."""
    try:
        import gradio
    except ImportError as error:
        raise InputError(MISSING) from error
    return gradio


@contextmanager
def served(
    session: Session, marks: Sequence[str], max_new_tokens: int, host: str = "127.0.0.1", port: int | None = None
) -> Iterator[str]:
    """Serve the page inside the context, which yields its address. marks: names of the whole strengths from 1 on.

    port: by default the first free one from 7860 on. Raises InputError if the port cannot be used.
    """
    page = build(session, marks, max_new_tokens)
    try:
        _, address, _ = page.launch(
            server_name=host, server_port=port, share=False, inbrowser=False, quiet=True, prevent_thread_lock=True,
            footer_links=[], ssr_mode=False, mcp_server=False, max_file_size=LARGEST_FILE,
        )  # fmt: skip
        yield address
    except OSError as error:
        raise InputError(f"--host {host} --port {port}: cannot be served there ({error}); choose another") from error
    finally:
        page.close(verbose=False)


def build(session: Session, marks: Sequence[str], max_new_tokens: int) -> Any:
    """The page as a gradio application, which is not started."""
    gradio = require_gradio()

    def answer(*inputs: Any) -> Iterator[tuple[str, ...]]:
        try:
            yield from answers(session, max_new_tokens, *inputs)
        except VlmgraftError as error:
            raise gradio.Error(str(error), print_exception=False) from error

    with gradio.Blocks(title="vlmgraft play", analytics_enabled=False) as page:
        with gradio.Row():
            picture = gradio.Image(
                label="picture", type="filepath", image_mode=None, height=210, sources=["upload", "clipboard"]
            )
            with gradio.Column():
                text = gradio.Textbox(label="question", max_length=MAX_CHARACTERS)
                dial = gradio.Slider(
                    0, len(marks), value=len(marks), step=0.05, label="strength",
                    info="; ".join(["0: the VLM", *(f"{at}: {mark}" for at, mark in enumerate(marks, 1))]),
                )  # fmt: skip
                button = gradio.Button("ask", variant="primary")
        with gradio.Row():
            columns = [gradio.Textbox(label=label, lines=8) for label in ("VLM", "with gates")]
        with gradio.Row():
            footers = [gradio.Markdown() for _ in columns]
        gradio.on(
            [button.click, text.submit, dial.release], answer, [picture, text, dial], [*columns, *footers],
            trigger_mode="always_last", concurrency_limit=1, api_visibility="private",
        )  # fmt: skip
    return page


def answers(
    session: Session, max_new_tokens: int, picture: str | None, text: str, strength: float
) -> Iterator[tuple[str, str, str, str]]:
    """The page's texts as the answers grow: both answers, and below each its length and, at the end, the KL.

    picture: path of an image. Raises DataError if it cannot be opened, and as `Session.ask`.
    """
    images = (open_picture(Path(picture), "the picture"),) if picture else ()
    for exchange in session.ask(Question(text, images), strength, max_new_tokens):
        lengths = [f"{len(side.ids)} tokens" if side.ids else "…" for side in (exchange.vlm, exchange.injected)]
        kl = "" if exchange.kl is None else f", KL {exchange.kl:.4f} nats per token of the VLM's answer"
        yield exchange.vlm.text, exchange.injected.text, lengths[0], lengths[1] + kl
