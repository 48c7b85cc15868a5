"""Finds the language model of a VLM whose family is not listed: by the donor's roles, shapes and layer count.

A suffix alone does not identify it (vision towers have `layers.N.self_attn.q_proj` too), so a prefix is accepted only
if every projection of every layer of the donor exists under it in the donor's shape, there are no further layers, and
no other prefix passes.
"""

from __future__ import annotations

import dataclasses
import itertools
import re
from typing import TYPE_CHECKING

from vlmgraft.alignment.families import Place
from vlmgraft.alignment.layouts import part_shapes
from vlmgraft.alignment.view import TextView, text_view
from vlmgraft.errors import AlignmentError

if TYPE_CHECKING:
    from vlmgraft.checkpoint.header import TensorInfo
    from vlmgraft.checkpoint.index import Checkpoint

_LAYER = re.compile(r"(.*?)layers\.(\d+)\.")


def locate(vlm: Checkpoint, donor: TextView) -> Place:
    """The one place in `vlm` whose decoder layers have the donor's roles, shapes and count.

    Raises:
        AlignmentError: no prefix passes (with the reason for each) or several do.
    """
    layered: dict[str, dict[str, TensorInfo]] = {}
    for name, info in vlm.tensors.items():
        if match := _LAYER.match(name):
            layered.setdefault(match[1], {})[name] = info
    heads = [name.removesuffix(".weight") for name in vlm.tensors if name.endswith("lm_head.weight")]
    passed: list[Place] = []
    failed: list[str] = []
    for prefix, tensors in sorted(layered.items()):
        place = Place(prefix, _head_of(prefix, heads))
        why = _mismatch(dataclasses.replace(vlm, tensors=tensors), place, donor)
        if why is None:
            passed.append(place)
        else:
            failed.append(f"{prefix}layers.*: {why}")
    if len(passed) == 1:
        return passed[0]
    model_type = vlm.config.get("model_type")
    head = f"{vlm.path}: model_type {model_type!r} is not listed, and its language model cannot be told by structure"
    if passed:
        raise AlignmentError(
            f"{head}: {', '.join(place.body + 'layers.*' for place in passed)} all fit the donor {donor.label}"
        )
    if failed:
        reasons = "; ".join(failed[:4]) + ("; …" if len(failed) > 4 else "")
        raise AlignmentError(f"{head}: nothing has the layers of the donor {donor.label}. {reasons}")
    raise AlignmentError(f"{head}: it has no tensors named …layers.N.…")


def _mismatch(vlm: Checkpoint, place: Place, donor: TextView) -> str | None:
    """Why the layers at `place` are not the donor's, or None when they are."""
    try:
        view = text_view(vlm, place)
    except AlignmentError as error:
        return str(error)
    if view.layers != donor.layers:
        return f"{view.layers} layers, the donor has {donor.layers}"
    for role, (held, position) in donor.parts.items():
        if held.group not in ("attention", "mlp", "norm") or held.layer is None:
            continue
        if role not in view.parts:
            return f"no {role}"
        mine, mine_at = view.parts[role]
        ours = part_shapes(mine.form, vlm.tensors[mine.name].shape)[mine_at]
        theirs = part_shapes(held.form, donor.checkpoint.tensors[held.name].shape)[position]
        if ours != theirs:
            return f"{role} is {ours}, the donor's {theirs}"
    return None


def _head_of(prefix: str, heads: list[str]) -> str:
    """The head that belongs to a prefix: the one that shares the longest beginning with it; `lm_head` by default."""
    pieces = prefix.split(".")

    def shared(name: str) -> int:
        pairs = zip(name.split("."), pieces, strict=False)
        return len(list(itertools.takewhile(lambda pair: pair[0] == pair[1], pairs)))

    return max(heads, key=shared, default="lm_head")
