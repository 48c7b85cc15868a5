"""Answers by a server: what is sent, what comes back, and what is refused."""

from __future__ import annotations

import base64
import io
import signal
import socket
import subprocess
import sys
import threading
from typing import Any

import pytest
from PIL import Image

from tests.chat_server import chat_server, said
from vlmgraft.data import endpoint
from vlmgraft.data.endpoint import Endpoint, Reply
from vlmgraft.data.questions import Question
from vlmgraft.errors import InputError, VlmgraftError


def test_questions_are_sent_with_their_images_where_the_text_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLMGRAFT_API_KEY", " k\n")
    bodies: list[dict[str, Any]] = []

    def reply(body: dict[str, Any]) -> dict[str, Any]:
        bodies.append(body)
        return said("Red.", tokens=[5, 2], prompt=40) if isinstance(body["messages"][0]["content"], list) else said("9")

    with chat_server(reply) as url:
        server = Endpoint(url, names=("any/name",)).serving()
        replies = [server.answer([question], 7)[0] for question in QUESTIONS]
    assert server.model == "served" and server.serving() is server
    assert replies == [Reply("Red.", [5, 2], True, 40), Reply("9", None, True, 3)]
    sent = bodies[0]["messages"][0]["content"]
    assert [part.get("text") for part in sent] == ["Is this ", None, "red?"]
    head, _, data = sent[1]["image_url"]["url"].partition(",")
    image = Image.open(io.BytesIO(base64.b64decode(data)))
    assert head == "data:image/png;base64" and image.size == (4, 2), "shrunk to max_pixels"
    assert bodies[1]["messages"] == [{"role": "user", "content": "4 + 5?"}]
    options = {"model": "served", "temperature": 0, "max_tokens": 7, "return_token_ids": True}
    assert options.items() <= bodies[0].items()


QUESTIONS = [
    Question("Is this <image>red?", (Image.new("RGB", (8, 4), "red"),), max_pixels=8),
    Question("4 + 5?"),
]


def test_answers_come_back_in_order() -> None:
    with chat_server(lambda body: said(body["messages"][0]["content"][::-1])) as url:
        replies = Endpoint(url, "m").answer([Question(f"{number}x") for number in range(9)], 5)
    assert [reply.text for reply in replies] == [f"x{number}" for number in range(9)]


def test_an_interruption_waits_for_no_reply() -> None:
    """A server that accepts and says nothing: the process ends long before the request does."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        script = (
            "import signal\n"
            "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # which a job in the background ignores
            "from vlmgraft.data.endpoint import Endpoint\nfrom vlmgraft.data.questions import Question\n"
            f"Endpoint('http://127.0.0.1:{server.getsockname()[1]}', 'm').answer([Question('?')] * 3, 5)"
        )
        asking = subprocess.Popen([sys.executable, "-c", script], stderr=subprocess.PIPE, text=True)
        server.settimeout(120)
        connections = [server.accept() for _ in range(3)]
        asking.send_signal(signal.SIGINT)
        assert "KeyboardInterrupt" in asking.communicate(timeout=60)[1]
        for connection, _ in connections:
            connection.close()


def test_the_model_is_found_among_several() -> None:
    models = [{"id": "a", "root": "org/a"}, {"id": "b", "root": "/models/b"}, {"id": "lora", "parent": "a"}]
    with chat_server(lambda body: said(""), models) as url:
        assert Endpoint(url, names=("x", "org/a")).serving().model == "a"
        assert Endpoint(url, names=("/models/b",)).serving().model == "b"
        with pytest.raises(VlmgraftError, match="serves a, b; serve org/c, and it alone"):
            Endpoint(url, names=("org/c",)).serving()
    for odd in ([None, "m", {}, {"id": 3}], []):
        with chat_server(lambda body: said(""), odd) as url, pytest.raises(VlmgraftError, match="serves no model"):
            Endpoint(url, names=("org/c",)).serving()
    with chat_server(lambda body: said(""), []) as url, pytest.raises(VlmgraftError, match="serves no model"):
        Endpoint(url, names=("org/c",)).serving()


def test_a_busy_server_is_asked_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(endpoint, "PAUSES", (0.0, 0.0))
    replies: list[Any] = [503, 429, said("at last")]
    with chat_server(lambda body: replies.pop(0)) as url:
        assert Endpoint(url, "m").answer([Question("q")], 5)[0].text == "at last"
    with chat_server(lambda body: 503) as url, pytest.raises(VlmgraftError, match=r"m at .*503.*is the server up"):
        Endpoint(url, "m").answer([Question("q")], 5)


@pytest.mark.parametrize(
    ("reply", "message"),
    [
        ({"choices": []}, "and no message"),
        ({"error": "x"}, "and no message"),
        (400, "HTTP Error 400"),
        ({"choices": [{"message": {"content": "4", "reasoning_content": "2 + 2"}}]}, "without a reasoning parser"),
        (said("4") | {"choices": [{"message": {"content": "4"}, "finish_reason": "abort"}]}, "no whole answer"),
        (said("4") | {"choices": [{"message": {"content": ["4"]}}]}, "no whole answer"),
        (said("4", tokens=[53.7]), "its token_ids are no list of numbers"),
        (said("4", tokens="53"), "its token_ids are no list of numbers"),
        (302, "HTTP Error 302"),
    ],
)
def test_what_is_no_answer_is_refused(reply: Any, message: str) -> None:
    with chat_server(lambda body: reply) as url, pytest.raises(VlmgraftError, match=message):
        Endpoint(url, "m").answer([Question("q")], 5)


@pytest.mark.parametrize("sent", [b"SSH-2.0-x\r\n", b"HTTP/1.1 200 OK\r\nContent-Length: 99\r\n\r\n{", b""])
def test_what_is_no_server_of_models_is_named(sent: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(endpoint, "PAUSES", ())
    with socket.create_server(("127.0.0.1", 0)) as server:

        def talk() -> None:
            connection, _ = server.accept()
            with connection:
                connection.recv(4096)
                connection.sendall(sent)

        threading.Thread(target=talk, daemon=True).start()
        with pytest.raises(VlmgraftError, match="is the server up"):
            Endpoint(f"http://127.0.0.1:{server.getsockname()[1]}/v1").serving()


def test_a_key_goes_nowhere_else(monkeypatch: pytest.MonkeyPatch) -> None:
    """A redirect is refused; a key that cannot be sent is not shown."""
    monkeypatch.setenv("VLMGRAFT_API_KEY", "sk-sec\nret")
    with pytest.raises(InputError, match="VLMGRAFT_API_KEY: holds characters") as caught:
        Endpoint("http://127.0.0.1:9/v1").serving()
    assert "sec" not in str(caught.value)


def test_an_address_is_checked() -> None:
    with pytest.raises(InputError, match="must begin with http"):
        Endpoint("localhost:8000").serving()
    with pytest.raises(VlmgraftError, match="is the server up"):
        Endpoint("http://127.0.0.1:9/v1").serving()
