"""Which modules and layers a recipe selects: names of groups, patterns on tensor names, ranges of layers."""

from __future__ import annotations

import difflib
import fnmatch
import re
from collections.abc import Iterable, Sequence

from vlmgraft.alignment.view import GROUPS, Held
from vlmgraft.errors import AlignmentError


def select_layers(layers: str | int | Sequence[int], count: int) -> frozenset[int]:
    """The layers that "all", "0-27", "3", "0-5,20-27" or a list of numbers selects out of `count`.

    Raises:
        AlignmentError: the selection has another form, is empty, runs backwards, or extends beyond the last layer.
    """
    if layers == "all":
        return frozenset(range(count))
    pieces = str(layers).split(",") if isinstance(layers, str | int) else [str(layer) for layer in layers]
    chosen: set[int] = set()
    for piece in pieces:
        match = re.fullmatch(r"\s*(\d{1,9})\s*(?:-\s*(\d{1,9})\s*)?", piece)
        if match is None:
            raise AlignmentError(
                f'layers: {layers!r:.200} is not "all", a range such as 0-27, or a list of layer numbers'
            )
        first, last = int(match[1]), int(match[2] or match[1])
        if max(first, last) >= count:
            raise AlignmentError(
                f"layers: {max(first, last)} is beyond the last layer, {count - 1} (layers are counted from 0)"
            )
        if last < first:
            raise AlignmentError(f"layers: the range {first}-{last} runs backwards; write {last}-{first}")
        chosen.update(range(first, last + 1))
    if not chosen:
        raise AlignmentError(f'layers: {layers!r} selects no layer; write "all" for all {count}')
    return frozenset(chosen)


def selects(entry: str, name: str, role: str, group: str) -> bool:
    """Whether one entry of `modules` selects the tensor of this name on disk, role in the text model and group."""
    if entry == "all":
        return group not in ("embeddings", "head")
    if entry in GROUPS:
        return group == entry
    return fnmatch.fnmatchcase(name, entry) or fnmatch.fnmatchcase(role, entry)


def select_modules(modules: Sequence[str], text: Iterable[Held]) -> frozenset[str]:
    """Names on disk of the tensors of the language model that `modules` selects.

    An entry is a group ("attention", "mlp", "norm", "embeddings", "head", "bias", "router", "other"), "all" (all groups
    but embeddings and head), or a shell pattern on the VLM's tensor names or on roles (`*.q_proj.weight`).

    Raises:
        AlignmentError: an entry is no group and matches no tensor of the language model, or nothing is selected.
    """
    text = list(text)
    chosen: set[str] = set()
    for entry in modules:
        matches = {held.name for held in text if selects(entry, held.name, held.role, held.group)}
        if not matches and entry not in (*GROUPS, "all"):
            near = difflib.get_close_matches(entry, [*GROUPS, "all"], 1)
            hint = f"; did you mean {near[0]!r}?" if near else "."
            raise AlignmentError(
                f"modules: {entry!r} is no group ({', '.join(GROUPS)}, all) and matches no tensor of the language "
                f"model{hint} The vision tower and the projector are never merged."
            )
        chosen |= matches
    if not chosen:
        raise AlignmentError(f"modules: {list(modules)} selects no tensor of the language model")
    return frozenset(chosen)
