"""Finds the tensors of donor and bases that pair with one tensor of the VLM's text model."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import TypedDict

from vlmgraft.alignment.layouts import WHOLE, WHOLE_FORM, Layout, Pick, Source, part_shapes
from vlmgraft.alignment.view import Held, TextView
from vlmgraft.errors import AlignmentError

FLOATS = ("BF16", "F16", "F32", "F64")
_OPTIONAL = ("bias", "head", "embeddings", "other")
"""Groups that one side may lack; the VLM's tensors are then kept. Without a projection or norm it is another model."""


class Sources(TypedDict, total=False):
    """The sources of one aligned tensor, by checkpoint."""

    donor: Source
    donor_base: Source
    vlm_base: Source


@dataclass
class Pairing:
    """The VLM's text model and the others' (`views`, by key of the recipe); counts differing dtypes for the notes.
    foreign: vocabulary rows whose token has no counterpart in one of the others."""

    text: TextView
    views: dict[str, TextView]
    dtypes: Counter[tuple[str, str, str]] = field(default_factory=Counter)
    foreign: frozenset[int] = frozenset()

    def notes(self) -> list[str]:
        """Notes on differing dtypes, and on tensors of the others that have no place in the VLM."""
        said = [
            f"{count} tensors are {theirs} in {key} and {ours} in the VLM: computed in float32, stored as {ours}"
            for (key, theirs, ours), count in sorted(self.dtypes.items())
        ]
        for key, view in self.views.items():
            homeless = [role for role in view.parts if role not in self.text.parts]
            if not homeless:
                continue
            refused = [role for role in homeless if view.parts[role][0].group not in _OPTIONAL]
            if refused:
                raise AlignmentError(
                    f"{key} {view.label} has {refused[0]} (and {len(refused) - 1} more), for which the VLM "
                    f"{self.text.label} has no place: it is another architecture"
                )
            more = f" and {len(homeless) - 1} more" if len(homeless) > 1 else ""
            said.append(f"{key}: {homeless[0]}{more} has no place in the VLM and is not carried over")
        return said


def pair_tensor(pairing: Pairing, held: Held) -> tuple[str, Sources | None]:
    """The reason and the sources of a tensor that the recipe selects; None for the sources when it must be kept.

    Raises:
        AlignmentError: a projection is missing on one side, shapes differ, or a tensor is quantised.
    """
    info = pairing.text.checkpoint.tensors[held.name]
    _refuse_quantised(held.name, info.dtype, pairing.text.label)
    rows = None
    if held.group in ("embeddings", "head") and len(info.shape) == 2:
        rows = _shared_rows(pairing, held, info.shape)
    found: Sources = {}
    extras: list[str] = []
    for key, view in pairing.views.items():
        source = _find(view, held, pairing, key, rows)
        if source is None:
            return f"{held.group}: {key.replace('_', ' ')} has no {held.role}, so it stays as it is", None
        found[key] = source  # type: ignore[literal-required]
        if source.layout.kind == "parts":
            extras.append(f"{key} assembled from {len(source.names)} tensor{'s' if len(source.names) > 1 else ''}")
        elif held.role == "lm_head.weight" and view.parts[_role(view, held.role)][0].role != held.role:
            extras.append(f"{key} ties its head to its embeddings")
    if rows is not None and any(source.layout.kind == "rows" for source in found.values()):  # type: ignore[attr-defined]
        kept = sum(row < rows for row in pairing.foreign)
        what = f" but {kept} of other tokens" if kept else ""
        extras.append(
            f"the vocabularies share the first {rows} of {info.shape[0]} rows{what}; the others stay as they are"
        )
    reason = f"language model, {held.group}"
    return "; ".join([reason, *extras]) if extras else reason, found


def _role(view: TextView, role: str) -> str:
    """The role to read in `view`: the embeddings if a tied head is not on disk."""
    return "embed_tokens.weight" if role == "lm_head.weight" and role not in view.parts and view.tied else role


def _shared_rows(pairing: Pairing, held: Held, shape: tuple[int, ...]) -> int:
    """How many rows of a vocabulary the VLM and all sources that have the tensor share."""
    rows = [shape[0]]
    for view in pairing.views.values():
        entry = view.parts.get(_role(view, held.role))
        if entry is not None:
            rows.append(view.checkpoint.tensors[entry[0].name].shape[0])
    return min(rows)


def _find(view: TextView, held: Held, pairing: Pairing, key: str, rows: int | None) -> Source | None:
    """The source of `held` in `view`, or None if it is missing and optional."""
    ours = pairing.text.checkpoint.tensors[held.name]
    if rows is None and held.form is WHOLE_FORM:  # fast path for the usual case
        same = view.parts.get(held.role)
        if same is not None and same[0].form is WHOLE_FORM:
            info = view.checkpoint.tensors[same[0].name]
            if info.shape == ours.shape and info.dtype == ours.dtype:
                return Source((same[0].name,), WHOLE)
    names: dict[str, int] = {}
    picks: list[Pick] = []
    shapes = part_shapes(held.form, ours.shape)
    for part, shape in zip(held.parts, shapes, strict=True):
        entry = view.parts.get(_role(view, part))
        if entry is None:
            if held.group in _OPTIONAL:
                return None
            raise AlignmentError(
                f"{held.name}: {key} {view.label} has no {part}; it is another architecture, "
                "incomplete, or saved under other names: save VLM and text models with one release of transformers"
            )
        theirs, position = entry
        info = view.checkpoint.tensors[theirs.name]
        _check(held, shape, theirs, part_shapes(theirs.form, info.shape)[position], view, key, rows is not None)
        if theirs.name not in names:
            names[theirs.name] = len(names)
            _refuse_quantised(theirs.name, info.dtype, view.label)
            if info.dtype != ours.dtype:
                pairing.dtypes[key, info.dtype, ours.dtype] += 1
        picks.append(Pick(names[theirs.name], theirs.form, position))
    if rows is not None and (rows < ours.shape[0] or info.shape[0] != ours.shape[0] or pairing.foreign):
        kept = tuple(sorted(row for row in pairing.foreign if row < rows))
        return Source(tuple(names), Layout("rows", rows=rows, kept=kept))
    if len(names) == 1 and theirs.form == held.form and theirs.parts == tuple(_role(view, part) for part in held.parts):
        return Source(tuple(names), WHOLE)
    return Source(tuple(names), Layout("parts", picks=tuple(picks), into=held.form))


def _check(
    held: Held, ours: tuple[int, ...], theirs: Held, shape: tuple[int, ...], view: TextView, key: str, vocabulary: bool
) -> None:
    """Refuse parts of another shape; a vocabulary may have another length."""
    if ours != shape and not (vocabulary and ours[1:] == shape[1:]):
        raise AlignmentError(
            f"{held.name}: {list(ours)} in the VLM, {list(shape)} in {key} {view.label} ({theirs.name}): "
            f"choose a {key.replace('_', ' ')} of the same size and family as the VLM's language model"
        )


def _refuse_quantised(name: str, dtype: str, where: str) -> None:
    """Refuse dtypes that are not plain floating point."""
    if dtype not in FLOATS:
        raise AlignmentError(
            f"{name}: stored as {dtype} in {where}; quantised weights are not merged, take the checkpoint in "
            f"{', '.join(FLOATS)} that they were made from"
        )
