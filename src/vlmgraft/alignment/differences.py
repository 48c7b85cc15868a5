"""How the configs of two language models differ, and what each difference means for merged weights."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from vlmgraft.alignment.families import text_config

if TYPE_CHECKING:
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
    """One field in which the VLM's language model and another checkpoint (`other`, a key of the recipe) differ."""

    field: str
    other: str
    vlm: Any
    theirs: Any
    weight: Weight
    meaning: str


def config_differences(vlm: Checkpoint, other: Checkpoint, key: str) -> Iterator[Difference]:
    """The fields of `FIELDS` that both configs have with different values; `key` of the recipe names `other`."""
    ours, theirs = (_flat(text_config(one.config)) for one in (vlm, other))
    for field, (weight, meaning) in FIELDS.items():
        pair = ours.get(field), theirs.get(field)
        if None not in pair and pair[0] != pair[1]:
            yield Difference(field, key, *pair, weight, meaning)


def _flat(config: Mapping[str, Any]) -> dict[str, Any]:
    """The config with rotary settings under the names that releases of transformers before 5 used.

    Qwen-VL's split of the rotary frequencies over time, height and width is not scaling: text uses all of them alike.
    """
    flat = dict(config)
    section = flat.get("rope_parameters") or flat.get("rope_scaling")
    rope = dict(section) if isinstance(section, dict) else {}
    flat["rope_theta"] = rope.pop("rope_theta", flat.get("rope_theta"))
    kind = rope.pop("rope_type", rope.pop("type", "default"))
    rest = {key: value for key, value in rope.items() if key not in ("mrope_section", "mrope_interleaved", "type")}
    flat["rope_scaling"] = {"type": "default" if kind == "mrope" else kind, **rest}
    return flat
