"""Answers by a server: OpenAI's chat completions, as offered by vLLM, SGLang and hosted services.

Answers are greedy; questions are sent as separate, concurrent requests. vLLM returns token ids on request, other
servers only text. Replies are untrusted: they are validated, and an invalid one is an error that names the server.
"""

from __future__ import annotations

import base64
import io
import json
import os
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, as_completed
from dataclasses import dataclass, replace
from http.client import HTTPException
from typing import TYPE_CHECKING, Any

from vlmgraft.errors import InputError, VlmgraftError
from vlmgraft.storage.urls import check_url

if TYPE_CHECKING:
    from PIL import Image

    from vlmgraft.data.questions import Question

SECONDS = 600
"""Timeout of one reply."""
LARGEST = 1 << 24
"""Maximum size of a reply in bytes."""
BUSY = (429, 502, 503, 504)
PAUSES = (1.0, 4.0, 15.0)
"""Seconds before each retry of a busy server."""
KEY = "VLMGRAFT_API_KEY"


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """Follows no redirects, so that the key is sent only to the given address."""

    def redirect_request(self, *_: Any) -> None:
        return None


_open = urllib.request.build_opener(_NoRedirect).open


@dataclass(frozen=True)
class Reply:
    """An answer. tokens: its token ids with the end token; None if the server does not return them. ended: not cut by
    the limit. prompt_tokens: number of the prompt's tokens, images included; 0 if the server does not report it."""

    text: str
    tokens: list[int] | None
    ended: bool
    prompt_tokens: int


@dataclass(frozen=True)
class Endpoint:
    """A server's base address, such as http://127.0.0.1:8000/v1, and the model to ask.

    model: its name on the server, once known. names: names under which the server may list the model, or from which it
    may have loaded it. key: the environment variable that holds the key, if one is needed.
    """

    url: str
    model: str = ""
    names: tuple[str, ...] = ()
    key: str = KEY

    def serving(self) -> Endpoint:
        """This endpoint with the name of the model: the only served model that `names` lists, or else the only served
        model. Raises VlmgraftError if neither exists."""
        if self.model:
            return self
        listed = self._call("models").get("data")
        models = [model for model in listed if isinstance(model, dict)] if isinstance(listed, list) else []
        found = [model for model in models if isinstance(model.get("id"), str) and not model.get("parent")]
        wanted = [model for model in found if {model["id"], str(model.get("root"))} & set(self.names)]
        if len(wanted or found) != 1:
            there = ", ".join(model["id"] for model in found) or "no model"
            raise VlmgraftError(f"{self.url}: serves {there}; serve {self.names[0]}, and it alone")
        return replace(self, model=(wanted or found)[0]["id"])

    def answer(self, questions: Sequence[Question], max_new_tokens: int) -> list[Reply]:
        """Greedy answers to all questions at once; raises VlmgraftError naming the server as soon as one of them fails.

        After Ctrl-C or an error, the other requests continue in daemon threads, which end with the process.
        """
        replies: list[Future[Reply]] = [Future() for _ in questions]

        def ask(reply: Future[Reply], question: Question) -> None:
            try:
                reply.set_result(self._answer(question, max_new_tokens))
            except BaseException as error:  # noqa: BLE001  (raised again where it is waited for)
                reply.set_exception(error)

        for given in zip(replies, questions, strict=True):
            threading.Thread(target=ask, args=given, daemon=True).start()
        for reply in as_completed(replies):
            reply.result()
        return [reply.result() for reply in replies]

    def _answer(self, question: Question, limit: int) -> Reply:
        options = {"temperature": 0, "max_tokens": limit, "return_token_ids": True, "skip_special_tokens": False}
        reply = self.chat(_content(question), options)
        choice, usage = reply["choices"][0], reply.get("usage")
        message, tokens, reason = choice["message"], choice.get("token_ids"), choice.get("finish_reason")
        text = message.get("content") or ""
        if tokens is None and (message.get("reasoning_content") or message.get("reasoning")):
            raise VlmgraftError(f"{self.url}: takes the reasoning out of answers; start it without a reasoning parser")
        if tokens is not None and not (isinstance(tokens, list) and all(type(one) is int for one in tokens)):
            raise VlmgraftError(f"{self.url}: its token_ids are no list of numbers, but {tokens!r:.60}")
        if not isinstance(text, str) or reason not in ("stop", "length", None):
            raise VlmgraftError(f"{self.url}: replied {text!r:.60}, ended by {reason!r:.40}: that is no whole answer")
        length = usage.get("prompt_tokens") if isinstance(usage, dict) else None
        return Reply(text, tokens, reason != "length", length if type(length) is int and 0 < length < 1 << 24 else 0)

    def chat(self, content: Any, options: Mapping[str, Any]) -> dict[str, Any]:
        """The reply to one message of the user, as JSON; raises VlmgraftError unless it holds a message."""
        body = {"model": self.model, "messages": [{"role": "user", "content": content}], **options}
        reply = self._call("chat/completions", body)
        try:
            whole = isinstance(reply["choices"][0]["message"], dict)
        except (LookupError, TypeError):
            whole = False
        if not whole:
            raise VlmgraftError(f"{self.model} at {self.url}: replied {str(reply)[:120]!r}, and no message")
        return reply

    def _call(self, path: str, body: Mapping[str, Any] | None = None) -> dict[str, Any]:
        check_url(self.url, "endpoint")
        headers, key = {"Content-Type": "application/json"}, os.environ.get(self.key, "").strip()
        if key:
            if not key.isascii() or not key.isprintable():
                raise InputError(f"{self.key}: holds characters that no key has")
            headers["Authorization"] = f"Bearer {key}"
        sent = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(f"{self.url.rstrip('/')}/{path}", sent, headers)
        for pause in (*PAUSES, None):
            try:
                with _open(request, timeout=SECONDS) as response:
                    reply = json.loads(response.read(LARGEST))
                if not isinstance(reply, dict):
                    raise ValueError(f"no JSON object: {str(reply)[:80]}")
                return reply
            except (OSError, ValueError, HTTPException, RecursionError) as error:
                if pause is None or not _passing(error):
                    where = f"{self.model} at {self.url}" if self.model else self.url
                    raise VlmgraftError(f"{where}: {error!s:.200} {_refusal(error)}; is the server up?") from error
                time.sleep(pause)
        raise AssertionError


def _passing(error: Exception) -> bool:
    """Whether an error may be transient: the server says that it is busy, or dropped the connection."""
    dropped = getattr(error, "reason", error)  # urllib wraps the socket's error
    return isinstance(dropped, ConnectionResetError) or getattr(error, "code", None) in BUSY


def _refusal(error: Exception) -> str:
    """The text of a server's error response."""
    try:
        return error.read(300).decode(errors="replace") if isinstance(error, urllib.error.HTTPError) else ""
    except (OSError, HTTPException):
        return ""


def _content(question: Question) -> Any:
    """A user's message: a text, or parts with images in PNG."""
    if not question.images:
        return question.prompt
    from vlmgraft.data.questions import open_images

    images = iter(open_images(question))
    return [
        part if part["type"] == "text" else {"type": "image_url", "image_url": {"url": _data_url(next(images))}}
        for part in question.parts
    ]


def _data_url(image: Image.Image) -> str:
    image.save(held := io.BytesIO(), "PNG")
    return "data:image/png;base64," + base64.b64encode(held.getvalue()).decode()
