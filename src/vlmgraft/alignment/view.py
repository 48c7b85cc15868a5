"""A checkpoint seen as a text model: which tensor on disk plays which role, under Llama's names.

Roles are the names inside a Llama-like decoder: `layers.3.self_attn.q_proj.weight`, `embed_tokens.weight`,
`norm.weight`, `lm_head.weight`. A tensor that holds several matrices (`alignment/layouts.py`) has a role of its own and
lists its parts.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from vlmgraft.alignment.families import RENAMES, TEXT_PLACES, Place, find_family, text_config, text_type
from vlmgraft.alignment.layouts import WHOLE_FORM, Form
from vlmgraft.errors import AlignmentError

if TYPE_CHECKING:
    from vlmgraft.checkpoint.index import Checkpoint

Group = Literal["attention", "mlp", "norm", "embeddings", "head", "bias", "router", "other"]
GROUPS: tuple[Group, ...] = ("attention", "mlp", "norm", "embeddings", "head", "bias", "router", "other")

_IN_LAYER = re.compile(r"layers\.(\d+)\.(.+)")
_ANY_LAYER = re.compile(r"(.*?)layers\.(\d+)\.")
MOST_EXPERTS = 10_000
_ROUTERS = ("mlp.gate.", "mlp.router.", "mlp.shared_expert_gate.")


class Held(NamedTuple):
    """One tensor of a text model: its name on disk, its role and layer, and the parts that `form` says it holds."""

    name: str
    role: str
    layer: int | None
    group: Group
    form: Form
    parts: tuple[str, ...]


@dataclass(frozen=True)
class TextView:
    """The text model inside a checkpoint. `held` is by name on disk, `parts` gives each part's tensor and position."""

    checkpoint: Checkpoint
    place: Place
    text_type: str | None
    layers: int
    tied: bool
    held: Mapping[str, Held]
    parts: Mapping[str, tuple[Held, int]]

    @property
    def label(self) -> str:
        """The folder, for messages."""
        return str(self.checkpoint.path)


def known_as(name: str, place: Place) -> tuple[str, int | None, Group] | None:
    """(role, layer, group) of a name on disk under `place`, or None when it is outside the text model."""
    if name.startswith(place.head) and name[len(place.head) :][:1] == ".":
        role = "lm_head." + name[len(place.head) + 1 :]
        return role, None, _group(role)
    if not name.startswith(place.body):
        return None
    inside = name[len(place.body) :]
    match = _IN_LAYER.match(inside) or _IN_LAYER.match(_renamed(inside))
    if match:
        role, group = _inside_layer(match[2])
        return f"layers.{match[1]}.{role}", int(match[1]), group
    role = _renamed(inside)
    return (role, None, _group(role)) if role in ("embed_tokens.weight", "norm.weight") else None


@lru_cache(maxsize=1 << 14)  # layers repeat each other, and a mixture of experts has 50,000 tensors
def _inside_layer(inside: str) -> tuple[str, Group]:
    role = _renamed(inside)
    return role, _group(role)


def _renamed(inside: str) -> str:
    for theirs, ours in RENAMES:
        inside = inside.replace(theirs, ours)
    return inside


def group_of(role: str) -> Group:
    """The module group of a role, as recipes name them."""
    return _group(role.split(".", 2)[2] if role.startswith("layers.") else role)


def _group(inside: str) -> Group:
    if inside.startswith("embed_tokens"):
        return "embeddings"
    if inside.startswith("lm_head"):
        return "head"
    if inside.endswith(".bias"):
        return "bias"
    if "norm" in inside:
        return "norm"
    if inside.startswith(_ROUTERS):
        return "router"
    if inside.startswith("mlp."):
        return "mlp"
    return "attention" if inside.startswith("self_attn.") and inside.endswith(".weight") else "other"


def find_place(checkpoint: Checkpoint, places: tuple[Place, ...]) -> Place | None:
    """The first of `places` whose layer 0 is on disk, preferring one whose head is there too."""
    names = (name for name in checkpoint.tensors if "layers.0." in name)
    bodies = {match[1] for name in names if (match := _ANY_LAYER.match(name)) and match[2] == "0"}
    found = [place for place in places if place.body in bodies]
    same = [place for place in found if place.body == found[0].body and f"{place.head}.weight" in checkpoint.tensors]
    return next(iter(same or found), None)


def text_view(checkpoint: Checkpoint, place: Place | None = None) -> TextView:
    """The text model of a checkpoint at `place`, or where its family or a text model's usual names put it.

    Raises:
        AlignmentError: no place fits, layers are missing in the count, or a fused tensor does not fit its head layout.
    """
    if place is None:
        family = find_family(checkpoint.config)
        place = find_place(checkpoint, (family.places if family else ()) + TEXT_PLACES)
    if place is None:
        raise AlignmentError(
            f"{checkpoint.path}: no decoder layers found under the names of a text model (model.layers.0.…); "
            f"model_type is {checkpoint.config.get('model_type')!r}"
        )
    held: dict[str, Held] = {}
    parts: dict[str, tuple[Held, int]] = {}
    for name, info in checkpoint.tensors.items():
        known = known_as(name, place)
        if known is None:
            continue
        role = known[0]
        if len(info.shape) < 3 and "wqkv" not in role:  # a tensor of one part, as nearly all are
            held[name] = item = Held(name, *known, WHOLE_FORM, (role,))
            parts[role] = (item, 0)
            continue
        form, inside = _form_of(checkpoint, name, role)
        held[name] = item = Held(name, *known, form, inside)
        for position, part in enumerate(inside):
            parts[part] = (item, position)
    numbers = {item.layer for item in held.values() if item.layer is not None}
    if numbers != set(range(len(numbers))):
        absent = [number for number in range(len(numbers)) if number not in numbers][:8]
        raise AlignmentError(
            f"{checkpoint.path}: decoder layers {absent} are missing under {place.body}layers., which go up to "
            f"{max(numbers)}; download the checkpoint again"
        )
    return TextView(
        checkpoint, place, text_type(checkpoint.config), len(numbers), _tied(checkpoint, place), held, parts
    )


def _tied(checkpoint: Checkpoint, place: Place) -> bool:
    """Whether a head that is not on disk is the embeddings: as the config says, else unless it is a headless model."""
    config = checkpoint.config
    said = config.get("tie_word_embeddings", text_config(config).get("tie_word_embeddings"))
    if said is not None:
        return bool(said)
    architectures = config.get("architectures")
    first = architectures[0] if isinstance(architectures, list) and architectures else ""
    return bool(place.body) and not str(first).endswith("Model")


def _form_of(checkpoint: Checkpoint, name: str, role: str) -> tuple[Form, tuple[str, ...]]:
    """The form of a tensor and the roles of its parts."""
    shape = checkpoint.tensors[name].shape
    if ".self_attn.wqkv." in role:
        form = Form("wqkv", heads=_head_layout(checkpoint, name))
        return form, tuple(role.replace("wqkv", f"{letter}_proj") for letter in "qkv")
    if ".mlp.experts." in role and len(shape) == 3:
        if shape[0] > MOST_EXPERTS:
            raise AlignmentError(f"{checkpoint.path}: {name} has {shape[0]} experts; at most {MOST_EXPERTS} are read")
        before, kind = role.rsplit(".", 1)
        experts = [f"{before}.{number}" for number in range(shape[0])]
        transposed = _experts_transposed(checkpoint, name)
        if kind == "gate_up_proj":
            parts = tuple(f"{expert}.{half}_proj.weight" for expert in experts for half in ("gate", "up"))
            return Form("gate_up", count=shape[0], transposed=transposed), parts
        if kind == "down_proj":
            parts = tuple(f"{expert}.down_proj.weight" for expert in experts)
            return Form("down", count=shape[0], transposed=transposed), parts
    return WHOLE_FORM, (role,)


def _head_layout(checkpoint: Checkpoint, name: str) -> tuple[int, int, int]:
    """(key-value heads, query heads per key-value head, head size) from config.json, checked against the shape."""
    inner: dict[str, Any] = text_config(checkpoint.config)
    shape = checkpoint.tensors[name].shape
    try:
        queries = int(inner["num_attention_heads"])
        keys = int(inner.get("num_key_value_heads") or queries)
        if queries < 1 or keys < 1:
            raise ValueError
    except (KeyError, TypeError, ValueError, OverflowError):
        raise AlignmentError(f"{name}: config.json must give num_attention_heads to take a fused wqkv apart") from None
    group = queries // keys
    if queries % keys or shape[0] % (keys * (group + 2)):
        raise AlignmentError(
            f"{name}: {shape[0]} rows do not divide into {queries} query and 2 × {keys} key-value heads"
        )
    return keys, group, shape[0] // (keys * (group + 2))


def _experts_transposed(checkpoint: Checkpoint, name: str) -> bool:
    """Whether fused experts are stored [experts, in, out]: gate_up and down of one layer decide it together."""
    before = name.rsplit(".", 1)[0]
    try:
        up, down = (checkpoint.tensors[f"{before}.{kind}_proj"].shape for kind in ("gate_up", "down"))
    except KeyError as missing:
        raise AlignmentError(f"{name}: its counterpart {missing} is not in the checkpoint") from None
    if up[1] == 2 * down[2] and up[2] == down[1]:
        return False
    if up[2] == 2 * down[1] and up[1] == down[2]:
        return True
    raise AlignmentError(f"{name}: fused experts of shapes {up} and {down} do not pair as gate_up_proj and down_proj")
