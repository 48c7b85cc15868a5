"""Arguments that are lists, of which callers may give one entry alone."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any


def listed(values: Iterable[Any]) -> list[Any]:
    """The entries as a list; a text or a path is one entry, not its letters.

    >>> listed("attention"), listed(("attention", "mlp"))
    (['attention'], ['attention', 'mlp'])
    """
    return [values] if isinstance(values, str | Path) else list(values)
