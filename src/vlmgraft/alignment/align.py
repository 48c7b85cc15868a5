"""Pairs every tensor of a VLM with the donor's and the bases', and gives each one a verdict with its reason.

Only headers are read. Tensors of the vision tower and the projector are kept; tensors of the language model are merged,
or excluded by the recipe, or kept where the donor has nothing to give. What cannot pair is refused before work starts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple

from vlmgraft.alignment.families import find_family
from vlmgraft.alignment.layouts import Source
from vlmgraft.alignment.pair import Pairing, pair_tensor
from vlmgraft.alignment.select import select_layers, select_modules
from vlmgraft.alignment.structure import locate
from vlmgraft.alignment.view import Group, Held, TextView, find_place, text_view
from vlmgraft.errors import AlignmentError
from vlmgraft.records import collection_paused

if TYPE_CHECKING:
    from vlmgraft.checkpoint.index import Checkpoint


class AlignedTensor(NamedTuple):
    """One tensor of the VLM: what happens to it, why, and where the others keep their side of it.

    `name` is the name on disk, `role` the name inside the text model (None outside it). The sources are None unless the
    verdict is "merged" and the recipe gave that checkpoint.
    """

    name: str
    verdict: Literal["merged", "kept", "excluded"]
    reason: str
    role: str | None = None
    layer: int | None = None
    group: Group = "other"
    donor: Source | None = None
    donor_base: Source | None = None
    vlm_base: Source | None = None


@dataclass(frozen=True)
class Alignment:
    """Every tensor of the VLM once, in disk order, with the checkpoints they pair with and notes for the receipt."""

    vlm: Checkpoint
    donor: Checkpoint
    donor_base: Checkpoint | None
    vlm_base: Checkpoint | None
    tensors: tuple[AlignedTensor, ...]
    layers: int
    family: str
    notes: tuple[str, ...]

    @cached_property
    def merged(self) -> tuple[AlignedTensor, ...]:
        """The tensors whose verdict is "merged", in disk order."""
        return tuple(tensor for tensor in self.tensors if tensor.verdict == "merged")


@collection_paused()
def align(
    vlm: Checkpoint,
    donor: Checkpoint,
    donor_base: Checkpoint | None = None,
    vlm_base: Checkpoint | None = None,
    *,
    modules: Sequence[str] = ("attention", "mlp"),
    layers: str | int | Sequence[int] = "all",
) -> Alignment:
    """Pair the language model of `vlm` with `donor` and the bases, from headers alone.

    Args:
        modules: groups or patterns, see `select_modules`.
        layers: "all", "0-27", or numbers; embeddings, final norm and head belong to no layer and follow `modules`.
    Raises:
        AlignmentError: the same folder twice, another family, layer count or shape (names the tensor and both shapes),
            a quantised tensor, or a selection that selects nothing.
    """
    _refuse_same_folder(vlm, donor, donor_base, vlm_base)
    others = {"donor": donor, "donor_base": donor_base, "vlm_base": vlm_base}
    views = {key: text_view(checkpoint) for key, checkpoint in others.items() if checkpoint is not None}
    text, family, notes = _view_vlm(vlm, views["donor"])
    for key, view in views.items():
        notes += _check_kind(text, view, key)
    pairing = Pairing(text, views)
    chosen_layers = select_layers(layers, text.layers)
    chosen = select_modules(modules, text.held.values())
    tensors = tuple(_verdict(name, text.held.get(name), chosen, chosen_layers, pairing) for name in vlm.tensors)
    if not any(tensor.verdict == "merged" for tensor in tensors):
        raise AlignmentError(
            f"nothing to merge: modules {list(modules)} and layers {layers!r} leave no tensor of {vlm.path}"
        )
    return Alignment(vlm, donor, donor_base, vlm_base, tensors, text.layers, family, (*notes, *pairing.notes()))


def _verdict(
    name: str, held: Held | None, modules: frozenset[str], layers: frozenset[int], pairing: Pairing
) -> AlignedTensor:
    """The verdict on one tensor of the VLM."""
    if held is None:
        return AlignedTensor(name, "kept", "outside the language model: never changed")
    known = (held.role, held.layer, held.group)
    if name not in modules:
        return AlignedTensor(name, "excluded", f"{held.group} is not in modules", *known)
    if held.layer is not None and held.layer not in layers:
        return AlignedTensor(name, "excluded", f"layer {held.layer} is not in layers", *known)
    reason, sources = pair_tensor(pairing, held)
    if sources is None:
        return AlignedTensor(name, "kept", reason, *known)
    return AlignedTensor(name, "merged", reason, *known, **sources)


def _view_vlm(vlm: Checkpoint, donor: TextView) -> tuple[TextView, str, list[str]]:
    """The VLM's text model by its family's names, else by structure; the family's name; notes."""
    family = find_family(vlm.config)
    place = find_place(vlm, family.places) if family else None
    if family is not None and place is not None:
        return text_view(vlm, place), family.name, []
    place = locate(vlm, donor)
    model_type = vlm.config.get("model_type")
    why = f"names unusual for {family.name}" if family else f"model_type {model_type!r} is not a listed family"
    note = f"{why}: aligned by structure, language model at {place.body}layers.*"
    return text_view(vlm, place), f"{model_type or 'unknown'} (by structure)", [note]


def _check_kind(text: TextView, view: TextView, key: str) -> list[str]:
    """Refuse another kind of language model or number of layers; a note where a config does not tell."""
    who = key.replace("_", " ")
    if text.layers != view.layers:
        raise AlignmentError(
            f"{who} {view.label} has {view.layers} layers, the VLM {text.label} has {text.layers}: "
            f"choose a {who} of the VLM's size"
        )
    if text.text_type is None or view.text_type is None:
        silent = text if text.text_type is None else view
        return [f"{silent.label}: config.json names no listed kind of text model; paired by names and shapes alone"]
    if text.text_type != view.text_type:
        raise AlignmentError(
            f"{who} {view.label} is a {view.text_type} model, the language model of {text.label} is {text.text_type}: "
            f"choose a {who} tuned from the same base as the VLM's language model"
        )
    return []


def _refuse_same_folder(
    vlm: Checkpoint, donor: Checkpoint, donor_base: Checkpoint | None, vlm_base: Checkpoint | None
) -> None:
    """Refuse pairs whose difference would be zero everywhere because they are one folder."""
    pairs = (
        (
            "donor",
            donor,
            "donor_base",
            donor_base,
            "the task vector is zero; give the model the donor was tuned from",
        ),
        ("donor", donor, "vlm", vlm, "give a text model as donor"),
        ("vlm_base", vlm_base, "vlm", vlm, "the VLM's task vector is zero; give the text model it was built on"),
    )
    for first, one, second, other, remedy in pairs:
        if one is not None and other is not None and _same(one.path, other.path):
            raise AlignmentError(f"{first} and {second} are the same folder, {one.path}: {remedy}")


def _same(one: Path, other: Path) -> bool:
    return one.resolve() == other.resolve()
