"""What differs between the VLM's language model and its partners, from headers and configs alone.

Some differences are harmless (a longer context), some change what a weight means: a task vector of attention weights
carries over badly between models with other rotary frequencies or other heads.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from vlmgraft.alignment.families import text_config
from vlmgraft.alignment.view import TextView, text_view

if TYPE_CHECKING:
    from vlmgraft.alignment import Alignment
    from vlmgraft.checkpoint.index import Checkpoint

Weight = Literal["harmful", "note"]

FIELDS: Mapping[str, tuple[Weight, str]] = {
    "num_attention_heads": ("harmful", "the rows of q, k, v and o belong to other heads"),
    "num_key_value_heads": ("harmful", "the rows of k and v belong to other heads"),
    "head_dim": ("harmful", "the rows of q, k and v belong to other heads"),
    "rope_theta": ("harmful", "q and k were tuned for other rotary frequencies"),
    "rope_scaling": ("note", "positions are scaled differently"),
    "hidden_act": ("harmful", "the feed-forward layers compute something else"),
    "rms_norm_eps": ("note", "norms differ slightly"),
    "vocab_size": ("note", "token numbers beyond the smaller vocabulary have no partner"),
    "tie_word_embeddings": ("note", "one head is its embeddings, the other is a matrix of its own"),
    "max_position_embeddings": ("note", "contexts of another length"),
    "sliding_window": ("note", "attention reaches another distance"),
    "attention_bias": ("note", "projections with and without biases"),
}


@dataclass(frozen=True)
class Difference:
    """One field that the VLM's language model and another checkpoint (`other`, a key of the recipe) do not share."""

    field: str
    other: str
    vlm: Any
    theirs: Any
    weight: Weight
    meaning: str


def differences(alignment: Alignment) -> tuple[Difference, ...]:
    """All differences of configs, biases and vocabulary rows between the VLM and donor, donor base and VLM base."""
    others = {key: getattr(alignment, key) for key in ("donor", "donor_base", "vlm_base")}
    found: list[Difference] = []
    for key, checkpoint in others.items():
        if checkpoint is not None:
            found += _of_configs(alignment.vlm, checkpoint, key)
            found += _of_headers(alignment, checkpoint, key)
    return tuple(found)


def _of_configs(vlm: Checkpoint, other: Checkpoint, key: str) -> Iterator[Difference]:
    ours, theirs = (_flat(text_config(one.config)) for one in (vlm, other))
    for field, (weight, meaning) in FIELDS.items():
        pair = ours.get(field), theirs.get(field)
        if None not in pair and pair[0] != pair[1]:
            yield Difference(field, key, *pair, weight, meaning)


def _flat(config: Mapping[str, Any]) -> dict[str, Any]:
    """The config with rotary settings under the names that releases of transformers before 5 used.

    Qwen-VL's split of the rotary frequencies over time, height and width is no scaling: text uses all of them alike.
    """
    flat = dict(config)
    rope = dict(flat.get("rope_parameters") or flat.get("rope_scaling") or {})
    flat["rope_theta"] = rope.pop("rope_theta", flat.get("rope_theta"))
    kind = rope.pop("rope_type", rope.pop("type", "default"))
    rest = {key: value for key, value in rope.items() if key not in ("mrope_section", "mrope_interleaved", "type")}
    flat["rope_scaling"] = {"type": "default" if kind == "mrope" else kind, **rest}
    return flat


def _of_headers(alignment: Alignment, other: Checkpoint, key: str) -> Iterator[Difference]:
    theirs = text_view(other)
    ours = {one.role for one in alignment.tensors if one.role}
    for kind, ending in (("biases", ".bias"), ("query and key norms", "_norm.weight")):
        counts = [sum(role.endswith(ending) and "layers." in role for role in names) for names in (ours, theirs.parts)]
        if counts[0] != counts[1]:
            meaning = f"{kind} in the layers that only one side has stay as the VLM has them"
            yield Difference(kind, key, counts[0], counts[1], "note", meaning)
    rows = _rows(alignment), _embedding_rows(theirs, other)
    if None not in rows and rows[0] != rows[1]:
        yield Difference("embedding rows", key, *rows, "note", "only the shared rows could be merged")


def _rows(alignment: Alignment) -> int | None:
    name = next((one.name for one in alignment.tensors if one.role == "embed_tokens.weight"), None)
    return alignment.vlm.tensors[name].shape[0] if name else None


def _embedding_rows(view: TextView, checkpoint: Checkpoint) -> int | None:
    entry = view.parts.get("embed_tokens.weight")
    return checkpoint.tensors[entry[0].name].shape[0] if entry else None
