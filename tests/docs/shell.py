"""Runs a page's blocks in one folder: bash by bash itself, `vlmgraft` in this process, so that nothing is loaded twice.

On the PATH of the shell `vlmgraft` is a few lines that send their arguments here through a socket. Bash, pipes and exit
codes are the real ones; only the start of the interpreter is saved.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import select
import shlex
import socket
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

SHORTENED = ("merge", "gates", "decompose", "front", "tune")
_CLIENT = """#!{python} -IS
import json, os, socket, sys
line = socket.socket(socket.AF_UNIX)
line.connect({address!r})
line.sendall(json.dumps([os.getcwd(), sys.argv[1:]]).encode() + b"\\n")
code, out, err = json.loads(line.makefile().readline())
try:
    sys.stdout.buffer.write(out.encode()); sys.stdout.flush()
except BrokenPipeError:
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
sys.stderr.buffer.write(err.encode())
sys.exit(code)
"""


class Shell:
    """A folder in which blocks run one after the other. more: options that shorten the block at hand."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.names = folder, {"__name__": "page"}
        self.more: list[str] = []
        self._private = tempfile.TemporaryDirectory()
        private = Path(self._private.name)
        self._server = socket.socket(socket.AF_UNIX)
        self._server.bind(str(private / "socket"))
        self._server.listen()
        client = private / "bin" / "vlmgraft"
        client.parent.mkdir()
        client.write_text(_CLIENT.format(python=sys.executable, address=str(private / "socket")))
        client.chmod(0o755)
        self._environment = {**os.environ, "PATH": f"{client.parent}:{os.environ['PATH']}"}

    def close(self) -> None:
        """Give back the socket and its folder."""
        self._server.close()
        self._private.cleanup()

    def bash(self, script: str) -> tuple[int, str, str]:
        """Run a script; its exit code, output and errors."""
        with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
            process = subprocess.Popen(
                ["bash", "-euo", "pipefail", "-c", script],
                cwd=self.folder, env=self._environment, stdin=subprocess.DEVNULL, stdout=out, stderr=err,
            )  # fmt: skip
            while process.poll() is None:
                if select.select([self._server], [], [], 0.02)[0]:
                    self._serve()
            out.seek(0)
            err.seek(0)
            return process.returncode, out.read(), err.read()

    def python(self, script: str, where: str) -> str:
        """Run a script in this process, with the names of the page's earlier ones; its output."""
        said = io.StringIO()
        with _chdir(self.folder), contextlib.redirect_stdout(said):
            exec(compile(script, where, "exec"), self.names)
        return said.getvalue()

    def _serve(self) -> None:
        line, _ = self._server.accept()
        with line, line.makefile("rw") as file:
            place, arguments = json.loads(file.readline())
            if arguments[:1] and arguments[0] in SHORTENED:
                arguments = [*arguments, *self.more]
            file.write(json.dumps(_call(place, arguments)) + "\n")


@contextlib.contextmanager
def _chdir(folder: Path | str) -> Any:
    before = Path.cwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


def _call(place: str, arguments: list[str]) -> tuple[int, str, str]:
    """The command line in this process."""
    from vlmgraft import cli

    out, err, before, code = io.StringIO(), io.StringIO(), sys.argv, 0
    sys.argv = ["vlmgraft", *arguments]
    try:
        with _chdir(place), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            cli.main()
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    finally:
        sys.argv = before
    return code, out.getvalue(), err.getvalue()


def options(text: str) -> list[str]:
    """Options of a `run with` comment: `--set key=value` where a value may hold spaces inside brackets."""
    words: list[str] = []
    for word in text.split(" "):
        if words and words[-1].count("{") > words[-1].count("}"):
            words[-1] += f" {word}"
        else:
            words.append(word)
    return words if "{" in text else shlex.split(text)
