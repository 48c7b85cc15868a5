"""Exception tree. Every message names the file, the tensor or key, the offending value, and the remedy.

The command line maps the tree to exit codes: `InputError` → 2 (nothing was started), any other `VlmgraftError` → 1.
"""

from __future__ import annotations

import re

LONGEST = 2_000
"""Most characters of a message: messages quote files, and a file can hold anything."""


def printable(text: str) -> str:
    """The text as one line that is safe for a terminal: line breaks become spaces, other unprintable characters such as
    escape sequences are written out (\\x1b), and a long text is cut in the middle."""
    text = re.sub(r"[ \t]*[\r\n]+[ \t]*", " ", text).strip()
    if len(text) > LONGEST:
        text = f"{text[: LONGEST // 2]} … {text[-LONGEST // 3 :]}"
    return text if text.isprintable() else "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


class VlmgraftError(Exception):
    """Base of every error that vlmgraft raises on purpose. Its text is one printable line, whatever it quotes."""

    exit_code = 1

    def __str__(self) -> str:
        return printable(super().__str__())


class InputError(VlmgraftError):
    """The recipe or an input is wrong; nothing was started and nothing was written."""

    exit_code = 2


class RecipeError(InputError):
    """A recipe has an unknown key, a value out of range, or asks for something its method cannot do."""


class CheckpointError(InputError):
    """A checkpoint folder is missing, truncated, inconsistent or in an unsupported format."""


class AlignmentError(InputError):
    """The checkpoints do not pair: another family, another shape, or a task vector that is zero."""


class DataError(InputError):
    """A question file or an image cannot be used."""


class OutputError(InputError):
    """The output folder exists, equals an input, or cannot be written."""


class DamagedError(InputError, ValueError):
    """A file that vlmgraft wrote was damaged, or replaced by something else."""

    def __init__(self, path: object, why: object) -> None:
        super().__init__(f"{path}: is not what vlmgraft wrote ({why!s:.300}); take a whole copy, or make it again")


class NumericalError(VlmgraftError):
    """A computation failed numerically: NaN, infinity, overflow on the cast, no convergence."""


class WeightsError(NumericalError, CheckpointError):
    """An input tensor holds NaN or infinity; the message names tensor and file."""

    exit_code = 2
