"""Answers by a server: OpenAI's chat completions, as vLLM, SGLang and hosted services have them.

Greedy answers are asked for, each question on its own, many at a time. vLLM tells the answers' token ids when asked to;
of other servers the text is all there is. Nobody vouched for what they reply: it is checked, or refused by name.
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
"""For one reply."""
LARGEST = 1 << 24
"""Bytes of a reply."""
BUSY = (429, 502, 503, 504)
PAUSES = (1.0, 4.0, 15.0)
"""Seconds before a busy server is asked again."""
KEY = "VLMGRAFT_API_KEY"


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """A key is for the address that was given, and for no other."""

    def redirect_request(self, *_: Any) -> None:
        return None


_open = urllib.request.build_opener(_NoRedirect).open


@dataclass(frozen=True)
class Reply:
    """An answer. tokens: its ids, the one that ends it included; None where the server does not tell them. ended: not
    cut by the limit. prompt_tokens: of the question, images included; 0 where it is not told."""

    text: str
    tokens: list[int] | None
    ended: bool
    prompt_tokens: int


@dataclass(frozen=True)
class Endpoint:
    """A server's base address, such as http://127.0.0.1:8000/v1, and the model that it is asked for.

    model: its name there, once it is known. names: what it may be called, or was loaded as. key: the environment
    variable that holds the key, where one is needed.
    """

    url: str
    model: str = ""
    names: tuple[str, ...] = ()
    key: str = KEY

    def serving(self) -> Endpoint:
        """With the name of the model: the only one that the server has, or of several the one of `names`. Raises
        VlmgraftError where there is none."""
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
        """Greedy answers, all questions at once; raises VlmgraftError naming the server, once one of them failed.

        Who stops waiting, by ^C or for an error, leaves the other requests to threads that end with the process.
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
        asked = {"temperature": 0, "max_tokens": limit, "return_token_ids": True, "skip_special_tokens": False}
        reply = self.chat(_content(question), asked)
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
                    raise VlmgraftError(f"{where}: {error!s:.200} {_told(error)}; is the server up?") from error
                time.sleep(pause)
        raise AssertionError


def _passing(error: Exception) -> bool:
    """Whether a server may be only busy: it says so, or dropped the connection."""
    dropped = getattr(error, "reason", error)  # urllib wraps what the socket says
    return isinstance(dropped, ConnectionResetError) or getattr(error, "code", None) in BUSY


def _told(error: Exception) -> str:
    """What a server says of its refusal."""
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
