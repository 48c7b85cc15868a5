"""Pairs every tensor of a VLM with the donor's and the bases', and gives each one a verdict with its reason.

Only headers are read. Tensors of the vision tower and the projector are kept; tensors of the language model are merged,
excluded by the recipe, or kept if the donor has no counterpart. What cannot pair is refused before work starts.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple

from vlmgraft.alignment.differences import config_differences
from vlmgraft.alignment.families import TEXT_TYPES, same_kind, text_config
from vlmgraft.alignment.layouts import Source
from vlmgraft.alignment.pair import FLOATS, Pairing, pair_tensor
from vlmgraft.alignment.select import select_layers, select_modules
from vlmgraft.alignment.tokens import compare_tokens
from vlmgraft.alignment.view import VISION, Group, Held, TextView, text_view
from vlmgraft.checkpoint.adapter import merging
from vlmgraft.checkpoint.files import public_name
from vlmgraft.checkpoint.ggml import GGUF, LLAMA_IN_GGUF
from vlmgraft.checkpoint.packed import quantisation
from vlmgraft.errors import AlignmentError
from vlmgraft.storage.resources import collection_paused

if TYPE_CHECKING:
    from vlmgraft.checkpoint.index import Checkpoint


class AlignedTensor(NamedTuple):
    """One tensor of the VLM: its verdict, the reason, and its sources in the other checkpoints.

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

    @property
    def opened(self) -> dict[str, Checkpoint]:
        """The checkpoints that the recipe gives, by their keys."""
        sources = {key: getattr(self, key) for key in ("vlm", "donor", "donor_base", "vlm_base")}
        return {key: checkpoint for key, checkpoint in sources.items() if checkpoint is not None}

    @property
    def left_out(self) -> str:
        """One line that counts the language model's tensors which are not merged, by group."""
        counts = Counter(tensor.group for tensor in self.tensors if tensor.role and tensor.verdict != "merged")
        total = counts.total() + len(self.merged)
        groups = ", ".join(f"{count} {group}" for group, count in sorted(counts.items()))
        return f"language model: {len(self.merged)} of {total} tensors merged; not merged: {groups or 'none'}"

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
    if _sees(donor) and not _sees(vlm):
        raise AlignmentError(
            f"vlm {vlm.path} is a text model and donor {donor.path} a vision-language model: exchange the two"
        )
    others = {"donor": donor, "donor_base": donor_base, "vlm_base": vlm_base}
    notes = _made_of_several({"vlm": vlm, **others})
    views = {key: text_view(checkpoint) for key, checkpoint in others.items() if checkpoint is not None}
    text = text_view(vlm)
    if text_config(vlm.config) is vlm.config and text.text_type not in TEXT_TYPES.values():
        text = replace(text, text_type=None)  # a flat config names the VLM's kind, not its language model's
    _refuse_without_tower(vlm, text)
    notes += [
        f"{key.replace('_', ' ')}: its config.json names Python code of its own (auto_map), which is never run"
        for key, checkpoint in {"vlm": vlm, **others}.items()
        if checkpoint is not None and "auto_map" in checkpoint.config
    ]
    notes += _other_base(donor, donor_base)
    for key, view in views.items():
        notes += _check_kind(text, view, key)
    for key, view in views.items():
        notes += [
            f"warning: {row.field} is {row.vlm} in the VLM, {row.theirs} in {key.replace('_', ' ')}: {row.meaning}"
            for row in config_differences(vlm, view.checkpoint, key)
            if row.weight == "harmful"
        ]
    chosen_layers = select_layers(layers, text.layers)
    chosen = select_modules(modules, text.held.values())
    vocabulary = any(text.held[name].group in ("embeddings", "head") for name in chosen)
    said, foreign = _compare_tokenizers(vlm, views, vocabulary)
    notes += said
    pairing = Pairing(text, views, foreign=foreign)
    tensors = tuple(_verdict(name, text.held.get(name), chosen, chosen_layers, pairing) for name in vlm.tensors)
    if not any(tensor.verdict == "merged" for tensor in tensors):
        raise AlignmentError(
            f"nothing to merge: modules {list(modules)} and layers {layers!r} leave no tensor of {vlm.path}"
        )
    family = str(vlm.config.get("model_type") or "unknown")
    return Alignment(vlm, donor, donor_base, vlm_base, tensors, text.layers, family, (*notes, *pairing.notes()))


def _other_base(donor: Checkpoint, donor_base: Checkpoint | None) -> list[str]:
    """A warning if the donor is an adapter of another model than donor_base."""
    made_for = donor.adapter_of
    if made_for is None or donor_base is None or _same(made_for, donor_base.path):
        return []
    return [
        f"warning: the donor is an adapter of another model ({public_name(made_for)}) than donor_base "
        f"({public_name(donor_base.path)}): their difference is added as well; unless both hold the same weights, "
        "write as donor_base what its adapter_config.json names"
    ]


def _compare_tokenizers(
    vlm: Checkpoint, views: Mapping[str, TextView], vocabulary: bool
) -> tuple[list[str], frozenset[int]]:
    """Notes on tokens that differ, and the rows that must stay the VLM's if a `vocabulary` is merged."""
    tokens = [compare_tokens(vlm, view.checkpoint, key.replace("_", " ")) for key, view in views.items()]
    notes = [note for compared in tokens if compared is not None for note in compared.notes()]
    if not vocabulary:
        return notes, frozenset()
    if None in tokens:
        notes.append("not every checkpoint has a tokenizer.json: whether rows of embeddings mean the same is not known")
    return notes, frozenset().union(*(compared.foreign for compared in tokens if compared is not None))


def _verdict(
    name: str, held: Held | None, modules: frozenset[str], layers: frozenset[int], pairing: Pairing
) -> AlignedTensor:
    outside = held is not None and held.layer is None and held.group in ("norm", "other", "attention", "mlp")
    only_here = held is not None and held.role not in pairing.views["donor"].parts
    if held is None or (outside and only_here) or held.role.startswith(VISION):
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


def _made_of_several(checkpoints: Mapping[str, Checkpoint | None]) -> list[str]:
    """Notes on adapters and dequantised weights; they are published, so they contain no path. Unsupported quantised
    weights are refused here, before their names and shapes are taken for another architecture's."""
    notes = []
    for key, checkpoint in checkpoints.items():
        if checkpoint is not None and checkpoint.adapter_of is not None:
            if key == "vlm":
                raise AlignmentError(
                    f"vlm {checkpoint.path}: is an adapter; merge it with `{merging(checkpoint.path)}`, copy the "
                    f"processor's files of {checkpoint.adapter_of} into that folder and give it"
                )
            notes.append(
                f"{key.replace('_', ' ')}: an adapter that changes {len(checkpoint.packed)} matrices of its base; "
                "their sums are read in float32"
            )
        method = quantisation(checkpoint.config).get("quant_method") if checkpoint is not None else None
        if checkpoint is None or method is None:
            continue
        who = f"{key.replace('_', ' ')} {checkpoint.path}"
        left = next((info for info in checkpoint.tensors.values() if info.dtype not in FLOATS), None)
        if left is not None:
            raise AlignmentError(
                f"{who}: config.json says that its weights are quantised by {method} ({left.name} is {left.dtype}), "
                f"which is not read in this form; take the {', '.join(FLOATS)} release that it was made from"
            )
        quantised = {name: packed for name, packed in checkpoint.packed.items() if packed.error}
        if quantised:
            name, packed = next(iter(quantised.items()))
            notes.append(
                f"{key.replace('_', ' ')}: {len(quantised)} matrices are quantised by {method} and read as "
                f"{checkpoint.tensors[name].dtype}; each value may be off by {packed.error}, and so may the task vector"
            )
    return notes


def _refuse_without_tower(vlm: Checkpoint, text: TextView) -> None:
    """Refuse a VLM without tensors outside the language model: VLM and donor may be swapped."""
    if len(text.held) == len(vlm.tensors) and text_config(vlm.config) is vlm.config:
        raise AlignmentError(
            f"vlm {vlm.path}: has no vision tower, every tensor is of a language model; are vlm and donor swapped?"
        )


def _check_kind(text: TextView, view: TextView, key: str) -> list[str]:
    """Refuse another type of language model or another number of layers; a note if a config does not name its type."""
    who = key.replace("_", " ")
    if text.layers != view.layers:
        raise AlignmentError(
            f"{who} {view.label} has {view.layers} layers, the VLM {text.label} has {text.layers}: "
            f"choose a {who} of the VLM's size"
        )
    said = view.text_type
    if (
        said == "llama"
        and text.text_type in LLAMA_IN_GGUF
        and view.checkpoint.config.get("quantization_config") == GGUF
    ):
        said = None
    if text.text_type is None or said is None:
        silent = "vlm" if text.text_type is None else who
        return [f"{silent}: its config names no kind of text model; paired by names and shapes alone"]
    if not same_kind(text.text_type, said):
        raise AlignmentError(
            f"{who} {view.label} is a {said} model, the language model of {text.label} is {text.text_type}: "
            f"choose a {who} tuned from the same base as the VLM's language model"
        )
    return []


def _sees(checkpoint: Checkpoint) -> bool:
    """Whether the config mentions a vision tower."""
    return any("vision" in key or "visual" in key for key in checkpoint.config)


def _refuse_same_folder(
    vlm: Checkpoint, donor: Checkpoint, donor_base: Checkpoint | None, vlm_base: Checkpoint | None
) -> None:
    """Refuse pairs that are one folder, so that their difference would be zero everywhere."""
    pairs = (
        ("donor", donor, "donor_base", donor_base, "the task vector is zero; give the model the donor was tuned from"),
        ("donor", donor, "vlm", vlm, "give a text model as donor"),
        ("vlm_base", vlm_base, "vlm", vlm, "the VLM's task vector is zero; give the text model it was built on"),
    )
    for first, one, second, other, remedy in pairs:
        if one is not None and other is not None and _same(one.path, other.path):
            raise AlignmentError(f"{first} and {second} are the same folder, {one.path}: {remedy}")


def _same(one: Path, other: Path) -> bool:
    return one.resolve() == other.resolve()
