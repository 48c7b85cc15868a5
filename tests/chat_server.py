"""A chat server of the tests' own: OpenAI's two routes, with whatever a test lets it reply."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Reply = Callable[[dict[str, Any]], "dict[str, Any] | int"]
"""The body of a request → the reply, or an HTTP status."""


@contextmanager
def chat_server(reply: Reply, models: Sequence[dict[str, Any]] = ({"id": "served"},)) -> Iterator[str]:
    """Inside the context a server; its address."""
    one = threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self._send({"data": list(models)} if self.path == "/v1/models" else 404)

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with one:
                self._send(reply(body) if self.path == "/v1/chat/completions" else 404)

        def _send(self, content: dict[str, Any] | int) -> None:
            self.send_response(content if isinstance(content, int) else 200)
            self.end_headers()
            self.wfile.write(json.dumps({} if isinstance(content, int) else content).encode())

        def log_message(self, *_: Any) -> None:
            """Nothing on the terminal."""

    class Server(ThreadingHTTPServer):
        request_queue_size = 64  # of connections that are not taken yet; more are reset

    server = Server(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/v1"
    finally:
        server.shutdown()
        server.server_close()


def said(text: str, *, tokens: Any = None, cut: bool = False, prompt: int = 3) -> dict[str, Any]:
    """A reply as vLLM has it."""
    choice = {"message": {"content": text}, "finish_reason": "length" if cut else "stop"}
    return {
        "choices": [choice if tokens is None else choice | {"token_ids": tokens}],
        "usage": {"prompt_tokens": prompt},
    }
