"""Where the language model of a checkpoint is, from its config and its tensors."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from vlmgraft.alignment.families import Place, text_config
from vlmgraft.errors import AlignmentError

if TYPE_CHECKING:
    from vlmgraft.checkpoint.index import Checkpoint

NUMBERED = re.compile(r"((?:.*?\.)?)(\d+)\.(.+)")
"""(prefix, number, rest) of a tensor's name."""
TOWER = re.compile(
    r"vis|view|image|img|audio|video|speech|tower|projector|connector|merger|perceiver|resampler|modal|mm_|vq|pos_embed"
)
"""Name parts of modules outside the language model: towers, projectors and the like."""
HEADS = ("lm_head", "output", "unembed", "embed_out", "head")
_NO_TOKENS = re.compile(r"pos|patch|norm|layer|class|cls|type|" + TOWER.pattern)


def find_place(checkpoint: Checkpoint) -> Place:
    """Find the language model of a checkpoint, whatever its tower is made of: the stack of layers with token embeddings
    beside it. Of several, the one with the text config's depth, vocabulary and width.

    Raises:
        AlignmentError: no stack has token embeddings, several match equally well, or the model is an encoder-decoder.
    """
    if checkpoint.config.get("is_encoder_decoder"):
        raise AlignmentError(
            f"{checkpoint.path}: is an encoder and a decoder ({checkpoint.config.get('model_type')!r}), whose "
            "layers no text LLM has; choose a VLM with a decoder-only language model"
        )
    stacks: dict[str, set[str]] = {}
    embeddings: dict[str, str] = {}
    tables: dict[str, str] = {}
    heads: list[str] = []
    for name, info in checkpoint.tensors.items():
        if match := NUMBERED.match(name):
            stacks.setdefault(match[1], set()).add(match[2])
        elif len(info.shape) == 2 and name.endswith((".weight", ".embedding")):
            module = name.rpartition(".")[0]
            parent, _, last = ("." + module).rpartition(".")
            parent = (parent + ".")[1:]
            if last in HEADS:
                heads.append(module)
            elif ("embed" in last or last == "wte") and not _NO_TOKENS.search(last):
                embeddings.setdefault(parent, last)
                tables.setdefault(parent, name)
    found = []
    for prefix, numbers in stacks.items():
        bodies = [prefix[: match.start()] for match in re.finditer(r"[^.]+\.", prefix)]
        body = next((body for body in reversed(bodies) if body in embeddings), None)
        if body is not None and not TOWER.search(prefix[len(body) :]):
            found.append((len(numbers), Place(body, "", prefix[len(body) :], embeddings[body])))
    config = text_config(checkpoint.config)
    for wanted, value in (
        (config.get("num_hidden_layers"), lambda depth, _: depth),
        (config.get("vocab_size"), lambda _, place: checkpoint.tensors[tables[place.body]].shape[0]),
        (config.get("hidden_size"), lambda _, place: checkpoint.tensors[tables[place.body]].shape[1]),
    ):
        found = [one for one in found if value(*one) == wanted] or found
    for rank in (lambda one: one[1].stack.count("."), lambda one: one[1].stack != "layers.", lambda one: -one[0]):
        best = min(map(rank, found), default=0)
        found = [one for one in found if rank(one) == best]
    if len(found) != 1:
        names = ", ".join(f"{place.body}{place.stack}*" for _, place in found)
        why = f"{names} all have token embeddings" if found else "no stack of layers has token embeddings beside it"
        raise AlignmentError(
            f"{checkpoint.path}: its language model cannot be told by structure: {why}; model_type is "
            f"{checkpoint.config.get('model_type')!r}"
        )
    place = found[0][1]
    return Place(place.body, _head_of(place.body, heads), place.stack, place.embed)


def _head_of(body: str, heads: list[str]) -> str:
    """The head of a body: the one in the innermost module that contains the body; `lm_head` by default."""
    above = [head for head in heads if body.startswith(head.rpartition(".")[0])]
    return max(above, key=lambda head: head.count("."), default="lm_head")
