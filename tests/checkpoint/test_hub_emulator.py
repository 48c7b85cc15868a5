"""A hub in this process, spoken to over HTTP by huggingface_hub in a child: refusals, order, retries, the cache."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from hashlib import sha256
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open

COMMIT = "0" * 39 + "1"
MODELS = {"vlm": "vlm", "donor": "donor", "base": "base", "gated": "donor", "terms": "donor", "busy": "vlm",
          "damaged": "donor", "pickled": "base", "limited": "base", "dropped": "base", "cut": "base"}  # fmt: skip
"""Models on the hub, and which of the trio's folders each shows."""
REFUSED = {"gated": (403, "GatedRepo", ""), "terms": (401, "GatedRepo", "")}
"""Models whose listing is public and whose files are not: to a login without the terms accepted, and to none."""
HIDDEN = {
    "private": (401, "", "Invalid username or password."),
    "revoked": (401, "", "Invalid credentials in Authorization header"),
}
"""What the hub says of every model that it does not show to a user who is not logged in, there or not; and to a token
that was withdrawn."""


class Hub(BaseHTTPRequestHandler):
    """The routes of the hub that huggingface_hub takes; `server.trio` holds the files, `server.asked` what was got."""

    server: Any

    def log_message(self, *_: Any) -> None:
        """Quiet."""

    def do_HEAD(self) -> None:
        self.answer(body=False)

    def do_GET(self) -> None:
        self.answer(body=True)

    def answer(self, *, body: bool) -> None:
        parts = self.path.split("?")[0].strip("/").split("/")
        api = parts[:2] == ["api", "models"]
        owner, name, *rest = parts[2:] if api else parts
        revision = rest[1] if len(rest) > 1 else "main"
        self.server.asked[f"{name} {'/'.join(rest)} {self.command}"] += 1
        if name in HIDDEN:
            self.refuse(*HIDDEN[name])
            return
        if owner != "lab" or name not in MODELS:
            self.refuse(404, "RepoNotFound")
            return
        if revision not in ("main", COMMIT):
            self.refuse(404, "RevisionNotFound")
            return
        folder = self.server.trio / MODELS[name]
        files = sorted(path for path in folder.iterdir() if not (name == "pickled" and path.suffix == ".safetensors"))
        if api:
            siblings = [{"rfilename": path.name} for path in files]
            tree = [{"type": "file", "path": path.name, "size": path.stat().st_size, "oid": "0" * 40} for path in files]
            listing = tree if rest and rest[0] == "tree" else {"id": f"lab/{name}", "sha": COMMIT, "siblings": siblings}
            self.send(json.dumps(listing).encode(), body)
            return
        if name in REFUSED:
            self.refuse(*REFUSED[name])
            return
        self.server.asked[self.path] += 1
        first = self.server.asked[self.path] == 1
        if name in ("busy", "limited") and first:
            self.refuse(503 if name == "busy" else 429, "Busy")
            return
        if name == "dropped" and first:
            self.close_connection = True  # no answer at all
            return
        path = folder / rest[2]
        if path not in files:
            self.refuse(404, "EntryNotFound")
            return
        data = path.read_bytes()
        if name == "damaged" and path.suffix == ".safetensors":
            data = data[:8] + b"{not JSON" + data[17:]
        cut = name == "cut" and path.suffix == ".safetensors" and body and self.server.asked[f"{self.path} cut"] == 0
        self.server.asked[f"{self.path} cut"] += cut
        self.send(data, body, cut=cut)

    def refuse(self, status: int, code: str, message: str = "") -> None:
        self.send_response(status)
        for header, value in (("X-Error-Code", code), ("X-Error-Message", message)):
            if value:
                self.send_header(header, value)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def send(self, data: bytes, body: bool, *, cut: bool = False) -> None:
        """Answer with the data, or the range asked for; cut: the connection ends in the middle of it."""
        first, last, status = 0, len(data) - 1, 200
        if wanted := self.headers.get("Range"):
            begin, end = wanted.removeprefix("bytes=").split("-")
            first, last, status = int(begin or 0), min(last, int(end or last)), 206
        part = data[first : last + 1]
        self.send_response(status)
        self.send_header("ETag", f'"{sha256(data).hexdigest()}"')
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("Content-Length", str(len(part)))
        self.send_header("Content-Range", f"bytes {first}-{last}/{len(data)}")
        self.end_headers()
        if body:
            self.server.asked["bytes"] += len(part)
            self.wfile.write(part[: len(part) // 2] if cut else part)
            self.close_connection = self.close_connection or cut


@pytest.fixture(scope="module")
def asked_and_told(
    trio: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Counter[str], dict[str, str]]]:
    """What the hub was asked, and what became of every case of the child."""
    server: Any = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.trio, server.asked = trio, Counter()
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    folder = tmp_path_factory.mktemp("hub")
    environment = {**os.environ, "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}", "HF_HUB_OFFLINE": "0"}
    environment |= {"HF_HOME": str(folder / "cache"), "HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_DISABLE_XET": "1"}
    command = [sys.executable, str(Path(__file__).with_name("hub_child.py")), str(folder)]
    try:
        ran = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
        assert ran.returncode == 0, ran.stderr[-3000:]
        yield server.asked, json.loads(ran.stdout.splitlines()[-1])
    finally:
        server.shutdown()
        server.server_close()


@pytest.mark.parametrize(
    ("case", "sentence"),
    [
        ("output", "exists"),
        ("output of tune", "there: exists"),
        ("output of decompose", "there: exists, and lab/unasked, of which"),
        ("gated", "lab/gated: gated; accept its terms on the hub and log in with `hf auth login`"),
        ("gated in tune", "lab/gated: gated; accept its terms"),
        ("gated in decompose", "lab/gated: gated; accept its terms"),
        ("gated, not logged in", "lab/terms: gated; accept its terms"),
        ("missing", "lab/missing: no such folder, and no such model on the hub: it does not exist, or is private; for"),
        ("private", "lab/private: no such folder, and no such model on the hub: it does not exist, or is private; for"),
        ("revoked", "lab/revoked: the hub refuses your login"),
        ("revision", "lab/base@v9: the model exists, this revision does not"),
        ("pickled", "lab/pickled: has no safetensors"),
        ("damaged", "lab/damaged: the header of its weights is damaged"),
        ("offline, not cached", "lab/vlm2"),
    ],
)
def test_each_refusal_has_its_own_sentence(
    asked_and_told: tuple[Counter[str], dict[str, str]], case: str, sentence: str
) -> None:
    told = asked_and_told[1][case]
    assert told.startswith("refused: ") and sentence in told


def test_all_sources_are_asked_for_before_the_first_is_downloaded(
    asked_and_told: tuple[Counter[str], dict[str, str]],
) -> None:
    """The VLM `lab/vlm` stands in recipes of merge, tune and decompose that are refused: none of its weights are ever
    got in full. Where `--out` is there, the hub is not asked at all."""
    asked, _ = asked_and_told
    assert asked["vlm resolve/main/config.json HEAD"] >= 8
    assert not [key for key in asked if key.startswith("vlm ") and f"resolve/{COMMIT}/model.safetensors GET" in key]
    assert asked["gated resolve/main/config.json HEAD"] == 3
    assert not [key for key in asked if key.startswith("unasked ")]


def test_what_fails_once_is_asked_for_again(asked_and_told: tuple[Counter[str], dict[str, str]]) -> None:
    """`lab/limited` answers every file's first request with 429, `lab/dropped` hangs up on it, and `lab/cut` hangs up
    in the middle of the weights."""
    asked, told = asked_and_told
    for name in ("limited", "dropped", "cut"):
        assert told[name] == told["same bytes"], told[name]
    assert asked[f"/lab/cut/resolve/{COMMIT}/model.safetensors cut"] == 1
    assert asked["/lab/limited/resolve/main/config.json"] > 1 and asked["/lab/dropped/resolve/main/config.json"] > 1


def test_what_is_there_is_planned_merged_and_found_again_offline(
    asked_and_told: tuple[Counter[str], dict[str, str]], trio: Path
) -> None:
    """`lab/busy` answers every file's first request with 503."""
    _, told = asked_and_told
    assert told["headers"] == told["offline"] == "28"
    with safe_open(trio / "vlm" / "model.safetensors", "pt") as file:
        assert int(told["merged"]) == len(list(file.keys()))
