"""Removes local paths from values, so that nothing published says where files lie on this machine."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

SERVERS = ("endpoint", "donor_endpoint")
"""Keys of addresses in somebody's network; the results do not depend on them."""


def portable(value: Any, out: Path) -> Any:
    """Plain values, such as a recipe's, with every absolute path replaced, for a file in the folder `out`.

    A path below the parent of `out` becomes relative to `out` (`../models/vlm`); any other becomes `./NAME`, which
    reveals only its name. Paths after a name and a colon (`mathvista:/data/rows.jsonl`) are replaced, too. `SERVERS`
    are left out.
    """
    if isinstance(value, Mapping):
        return {key: portable(item, out) for key, item in value.items() if key not in SERVERS}
    if isinstance(value, list | tuple):
        return [portable(item, out) for item in value]
    if not isinstance(value, str):
        return value
    name, _, tail = value.partition(":")
    if len(name) > 1 and "/" not in name and tail[:1] == "/" != tail[1:2]:
        return f"{name}:{portable(tail, out)}"
    if not Path(value).is_absolute():
        return value
    parent = out.resolve().parent
    for path in (Path(value), Path(value).resolve()):
        if parent in path.parents:
            return f"../{path.relative_to(parent)}"
    return f"./{Path(value).name}"


_PATH = re.compile(r"(?<![\w.:/~<])/(?:[\w.@+-]+/)+([\w.@+-]+)")


def nameless(value: Any) -> Any:
    """Plain values with every absolute path in their strings, such as `/home/me/vlm`, replaced by `./vlm`."""
    if isinstance(value, Mapping):
        return {key: nameless(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [nameless(item) for item in value]
    return _PATH.sub(r"./\1", value) if isinstance(value, str) else value
