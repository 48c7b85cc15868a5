"""Answers by a server: OpenAI's chat completions, as vLLM, SGLang and hosted services have them.

Greedy answers are asked for, each question on its own, many at a time. vLLM tells the answers' token ids when asked to;
of other servers the text is all there is.
"""

from __future__ import annotations

import base64
import io
import json
import os
import time
import urllib.error
import urllib.request
from collections.abc import Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlmgraft.errors import InputError, VlmgraftError

if TYPE_CHECKING:
    from PIL import Image

    from vlmgraft.data.questions import Question

SECONDS = 600
"""For one reply."""
BUSY = (429, 502, 503, 504)
PAUSES = (1.0, 4.0, 15.0)
"""Seconds before a busy server is asked again."""


@dataclass(frozen=True)
class Reply:
    """An answer. tokens: its ids, the one that ends it included; None where the server does not tell them. ended: not
    cut by the limit. prompt_tokens: of the question, images included."""

    text: str
    tokens: list[int] | None
    ended: bool
    prompt_tokens: int


@dataclass(frozen=True)
class Endpoint:
    """A server's base address, such as http://127.0.0.1:8000/v1, and the name of the model that it is asked for.

    The key, where one is needed, is read from the environment variable OPENAI_API_KEY.
    """

    url: str
    model: str = ""

    def serving(self, names: Collection[str | Path]) -> Endpoint:
        """The same server, asked for the one model that it has, or of several for the one that is called or was loaded
        as one of these names. Raises VlmgraftError where there is none."""
        found = [model for model in self._call("models").get("data", ()) if not model.get("parent")]
        wanted = [model for model in found if {model.get("id"), model.get("root")} & set(map(str, names))]
        if len(wanted or found) != 1:
            listed = ", ".join(str(model.get("id")) for model in found) or "no model"
            raise VlmgraftError(f"{self.url}: serves {listed}; serve {next(iter(names))}, and it alone")
        return Endpoint(self.url, str((wanted or found)[0]["id"]))

    def answer(self, questions: Sequence[Question], max_new_tokens: int) -> list[Reply]:
        """Greedy answers, all questions at once; raises VlmgraftError naming the server."""
        with ThreadPoolExecutor(len(questions)) as pool:
            return list(pool.map(lambda question: self._answer(question, max_new_tokens), questions))

    def _answer(self, question: Question, limit: int) -> Reply:
        asked = {"temperature": 0, "max_tokens": limit, "return_token_ids": True, "skip_special_tokens": False}
        reply = self.chat(_content(question), asked)
        choice, usage = reply["choices"][0], reply.get("usage") or {}
        message = choice["message"]
        tokens, thought = choice.get("token_ids"), message.get("reasoning_content") or message.get("reasoning")
        if tokens is None and thought:
            raise VlmgraftError(f"{self.url}: takes the reasoning out of answers; start it without a reasoning parser")
        ended = choice.get("finish_reason") != "length"
        return Reply(str(message.get("content") or ""), tokens, ended, int(usage.get("prompt_tokens") or 0))

    def chat(self, content: Any, options: Mapping[str, Any]) -> dict[str, Any]:
        """The reply to one message of the user, as JSON; raises VlmgraftError unless it holds a message."""
        body = {"model": self.model, "messages": [{"role": "user", "content": content}], **options}
        reply = self._call("chat/completions", body)
        try:
            reply["choices"][0]["message"]["content"]
        except (LookupError, TypeError):
            raise VlmgraftError(f"{self.model} at {self.url}: replied {str(reply)[:120]!r}, and no message") from None
        return reply

    def _call(self, path: str, body: Mapping[str, Any] | None = None) -> dict[str, Any]:
        if not self.url.startswith(("http://", "https://")):
            raise InputError(f"a server's address must begin with http:// or https://, got {self.url!r}")
        headers = {"Content-Type": "application/json"}
        if key := os.environ.get("OPENAI_API_KEY"):
            headers["Authorization"] = f"Bearer {key}"
        sent = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(f"{self.url.rstrip('/')}/{path}", sent, headers)
        for pause in (*PAUSES, None):
            try:
                with urllib.request.urlopen(request, timeout=SECONDS) as response:
                    reply = json.load(response)
                if not isinstance(reply, dict):
                    raise ValueError(f"no JSON object: {str(reply)[:80]}")
                return reply
            except (OSError, ValueError) as error:
                told = error.read()[:300].decode(errors="replace") if isinstance(error, urllib.error.HTTPError) else ""
                if pause is None or not (isinstance(error, urllib.error.HTTPError) and error.code in BUSY):
                    where = f"{self.model} at {self.url}" if self.model else self.url
                    raise VlmgraftError(f"{where}: {error!s:.200} {told}".rstrip() + "; is the server up?") from error
                time.sleep(pause)
        raise AssertionError


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
