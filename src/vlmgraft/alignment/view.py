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

from vlmgraft.alignment.families import Place, renamed, text_config, text_type
from vlmgraft.alignment.layouts import WHOLE_FORM, Form
from vlmgraft.alignment.places import HEADS, NUMBERED, TOWER, find_place
from vlmgraft.errors import AlignmentError

if TYPE_CHECKING:
    from vlmgraft.checkpoint.index import Checkpoint

Group = Literal["attention", "mlp", "norm", "embeddings", "head", "bias", "router", "other"]
GROUPS: tuple[Group, ...] = ("attention", "mlp", "norm", "embeddings", "head", "bias", "router", "other")

VISION = "vision_layers."
"""Role prefix of parts of decoder layers that only images use."""
MOST_EXPERTS = 10_000
_FUSED = re.compile(r"\.(?:self_attn|mlp|shared_experts?)\.(wqkv|att_proj|gate_up_proj|ff_proj)\.")
"""Fused matrices: q, k, v interleaved (InternLM2) or stacked (Molmo2); gate, up; up, gate (Molmo2)."""
_STACK = re.compile(r"(?:^|\.)(?:layers?|blocks?|h)\.\d+\.")
"""Layers outside the decoder's stack: those of a tower, which may itself be a language model."""
_EXPERT = re.compile(r"mlp\.experts\.(\d{1,9})\.")
_MLP = re.compile(r"mlp|ffn|feed_forward|moe|expert|fc\d|(gate|up|down)_proj|per_layer")


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


def group_of(role: str, shape: tuple[int, ...] = (2, 2)) -> Group:
    """The module group of a role, as recipes name them: a linear layer's weight or experts belong to attention (or
    what stands in its place) or mlp; convolutions, scalars and other parameters to "other"."""
    return _group(role.split(".", 2)[2] if role.startswith("layers.") else role, len(shape), shape[:1] == (1,))


@lru_cache(maxsize=1 << 14)
def _group(inside: str, ndim: int, single: bool) -> Group:
    """single: whether the weight has a single output, as a shared expert's gate does."""
    *path, last = inside.split(".")
    module = path[-1] if path else last
    if inside.startswith("embed_tokens") and ndim > 1:
        return "embeddings"
    if inside.startswith("lm_head"):
        return "head"
    if last.endswith("bias"):
        return "bias"
    if ndim < 2:
        return "norm" if "norm" in inside else "other"
    if "attn" not in inside and (module in ("gate", "router") or "router" in inside or (single and "gate" in module)):
        return "router"
    experts = "expert" in inside or "moe" in inside
    if not (last == "weight" or experts) or ndim > 3 or (ndim == 3 and (not experts or "conv" in inside)):
        return "norm" if "norm" in inside else "other"
    if re.search("att", inside.split(".")[0]) or not _MLP.search(inside):
        return "norm" if "norm" in module and last == "weight" and "proj" not in module else "attention"
    return "mlp"


@dataclass(frozen=True)
class _VisionOnly:
    """Parts of the decoder that only images use. The text config names cross-attention layers (Llama 3.2 Vision), which
    are numbered among the others, and the first vision expert (ERNIE 4.5 VL). Adapters for pictures and speech
    (Phi-4-multimodal's files) are recognised by name."""

    cross_layers: frozenset[int]
    text_experts: int | None

    @classmethod
    def of(cls, config: dict[str, Any]) -> _VisionOnly:
        cross, experts = config.get("cross_attention_layers"), config.get("moe_num_experts")
        layers = [layer for layer in cross if isinstance(layer, int)] if isinstance(cross, list) else []
        first = experts[0] if isinstance(experts, list) and experts else experts
        return cls(frozenset(layers), first if isinstance(first, int) else None)

    def role(self, number: int, inside: str) -> tuple[str, int | None]:
        """(role, layer number among those that text uses; None if only images use it) of a tensor in layer `number`."""
        layer = number - sum(cross < number for cross in self.cross_layers)
        expert = _EXPERT.match(inside)
        beyond = expert is not None and self.text_experts is not None and int(expert[1]) >= self.text_experts
        both = self.text_experts is not None and inside.endswith(("gate.weight_1", "e_score_correction_bias"))
        if number in self.cross_layers or beyond or both or ".lora_" in inside:
            return f"{VISION}{number}.{inside}", None
        return f"layers.{layer}.{inside}", layer


def _towers(checkpoint: Checkpoint, place: Place) -> frozenset[str]:
    """Modules beside the language model's layers that have layers or convolutions of their own."""
    inside = {
        name[len(place.body) :]: info
        for name, info in checkpoint.tensors.items()
        if name.startswith(place.body) and not name.startswith(place.body + place.stack)
    }
    found = {name.split(".")[0] for name, info in inside.items() if len(info.shape) > 3 or _STACK.search(name)}
    return frozenset(found - {place.stack.split(".")[0]})


def _known_as(
    name: str, shape: tuple[int, ...], place: Place, vision_only: _VisionOnly, towers: frozenset[str]
) -> tuple[str, int | None, Group] | None:
    """(role, layer, group) of a name on disk under `place`, or None when it is outside the text model."""
    if name.startswith(place.head) and name[len(place.head) :][:1] == ".":
        role = "lm_head." + name[len(place.head) + 1 :]
        return role, None, group_of(role, shape)
    if not name.startswith(place.body):
        return None
    inside = name[len(place.body) :]
    if (
        inside.startswith(place.stack)
        and (match := NUMBERED.match(name))
        and len(place.body + place.stack) == len(match[1])
    ):
        inside = renamed(match[3])
        return *vision_only.role(int(match[2]), inside), group_of(f"layers.0.{inside}", shape)
    first = inside.split(".")[0]
    if TOWER.search(inside) or first in HEADS or first in towers or _STACK.search(inside):
        return None
    role = f"embed_tokens{inside[len(first) :]}" if first == place.embed else renamed(inside)
    return role, None, "embeddings" if "embed" in first and len(shape) == 2 else group_of(role, shape)


def text_view(checkpoint: Checkpoint, place: Place | None = None) -> TextView:
    """The text model of a checkpoint, at `place` or where `find_place` finds it.

    Raises:
        AlignmentError: no place fits, layer numbers have gaps, or a fused tensor does not fit its head layout.
    """
    place = place or find_place(checkpoint)
    vision_only, towers = _VisionOnly.of(text_config(checkpoint.config)), _towers(checkpoint, place)
    held: dict[str, Held] = {}
    parts: dict[str, tuple[Held, int]] = {}
    for name, info in checkpoint.tensors.items():
        known = _known_as(name, info.shape, place, vision_only, towers)
        if known is None:
            continue
        role = known[0]
        if len(info.shape) < 3 and not _FUSED.search(role):  # a tensor of one part, as nearly all are
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
            f"{checkpoint.path}: decoder layers {absent} are missing under {place.body}{place.stack}, which go up to "
            f"{max(numbers)}; download the checkpoint again"
        )
    return TextView(
        checkpoint, place, text_type(checkpoint.config), len(numbers), _tied(checkpoint, place), held, parts
    )


def _tied(checkpoint: Checkpoint, place: Place) -> bool:
    """Whether a head that is not on disk is tied to the embeddings: as the config says, else unless it is headless."""
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
    if match := _FUSED.search(role):
        kind, order = match[1], {"ff_proj": ("up", "gate"), "gate_up_proj": ("gate", "up")}.get(match[1], tuple("qkv"))
        parts = tuple(f"{role[: match.start(1)]}{part}_proj{role[match.end(1) :]}" for part in order)
        if len(order) == 2:
            return Form("rows", rows=(shape[0] // 2, shape[0] - shape[0] // 2)), parts
        keys, group, size = heads = _head_layout(checkpoint, name)
        if kind == "wqkv":
            return Form("wqkv", heads=heads), parts
        return Form("rows", rows=(keys * group * size, keys * size, keys * size)), parts
    if len(shape) == 3 and role.endswith((".experts.gate_up_proj", ".experts.down_proj")):
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
