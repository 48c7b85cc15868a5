"""Loading transformers models, and finding the text model's linear layers inside any of them.

Names on disk are not module names: a linear layer is found by its role in the text model, such as
"layers.3.self_attn.q_proj.weight", which is the end of its tensor name in every family.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoProcessor,
    AutoTokenizer,
    PreTrainedTokenizerFast,
)

from vlmgraft.errors import AlignmentError, CheckpointError

_ROLE = re.compile(r"(?:^|\.)(layers\.\d+\..+)$")


def load_vlm(path: str | Path, dtype: torch.dtype | str = "auto", device: torch.device | str = "cpu") -> Any:
    """The vision-language model of a folder or hub id, in evaluation mode; raises CheckpointError."""
    return _load(AutoModelForImageTextToText, path, dtype, device)


def load_text_model(path: str | Path, dtype: torch.dtype | str = "auto", device: torch.device | str = "cpu") -> Any:
    """The text LLM of a folder or hub id, in evaluation mode; raises CheckpointError."""
    return _load(AutoModelForCausalLM, path, dtype, device)


def load_config(path: str | Path) -> Any:
    """The transformers config of a folder or hub id; raises CheckpointError."""
    try:
        return AutoConfig.from_pretrained(_source(path))
    except (ValueError, OSError) as error:
        raise CheckpointError(f"{path}: its config.json is not one that transformers reads ({error})") from error


def load_processor(path: str | Path) -> Any:
    """The processor of a VLM, or the tokenizer of a text LLM; raises CheckpointError.

    A text folder that declares the generic tokenizer class is taken at its word: `AutoTokenizer` of transformers 5
    puts the class of the model type in its place, which reads a tokenizer.json that is not byte-level BPE wrongly.
    """
    source = _source(path)
    config = Path(source) / "tokenizer_config.json"
    if config.is_file() and not (Path(source) / "processor_config.json").is_file():
        declared = json.loads(config.read_text(encoding="utf-8")).get("tokenizer_class")
        if declared in ("TokenizersBackend", "PreTrainedTokenizerFast"):
            return PreTrainedTokenizerFast.from_pretrained(source)
    try:
        return AutoProcessor.from_pretrained(source)
    except (ValueError, OSError) as error:
        try:
            return AutoTokenizer.from_pretrained(source)
        except (ValueError, OSError):
            raise CheckpointError(f"{path}: no processor or tokenizer can be loaded: {error}") from error


def tokenizer_of(processor: Any) -> Any:
    """The tokenizer inside a processor; a tokenizer is its own."""
    return getattr(processor, "tokenizer", processor)


def text_model(model: Any) -> Any:
    """The decoder stack of the language model: the module with token embeddings and as many layers as the text
    configuration says. Raises AlignmentError when none or several fit.

    Vision towers have `layers` too, but no `embed_tokens`; a suffix alone would not tell them apart.
    """
    depth = model.config.get_text_config(decoder=True).num_hidden_layers
    found = [
        module
        for module in model.modules()
        if isinstance(getattr(module, "layers", None), nn.ModuleList)
        and hasattr(module, "embed_tokens")
        and len(module.layers) == depth
    ]
    if len(found) != 1:
        raise AlignmentError(f"{type(model).__name__}: {len(found)} modules look like a text model of {depth} layers")
    return found[0]


def output_head(model: Any) -> nn.Module:
    """The layer from hidden states to logits."""
    head = model.get_output_embeddings()
    if head is None:
        raise AlignmentError(f"{type(model).__name__} has no output head; load it with its language-model class")
    return head


def text_linears(model: Any) -> dict[str, nn.Linear]:
    """Role → linear layer, for every linear layer inside the decoder layers."""
    return {
        f"{name}.weight": module
        for name, module in text_model(model).named_modules()
        if name.startswith("layers.") and isinstance(module, nn.Linear)
    }


@dataclass(frozen=True)
class ExpertStack:
    """One parameter of a module of fused experts, [experts, out, in], where a gated projection can stand in for it."""

    module: nn.Module
    key: str

    @property
    def weight(self) -> nn.Parameter:
        """The parameter itself."""
        return getattr(self.module, self.key)


Projection = nn.Linear | ExpertStack


def text_experts(model: Any) -> dict[str, ExpertStack]:
    """Role → fused experts, for every three-dimensional parameter inside the decoder layers."""
    found = {}
    for name, module in text_model(model).named_modules():
        for key, parameter in module.named_parameters(recurse=False):
            if name.startswith("layers.") and parameter.ndim == 3:
                found[f"{name}.{key}"] = ExpertStack(module, key)
    return found


def role_of(name: str) -> str:
    """The role of a tensor of the text model, from its name on disk; the name itself outside decoder layers."""
    match = _ROLE.search(name)
    return match.group(1) if match else name


def match_linears(model: Any, names: Iterable[str]) -> dict[str, nn.Linear]:
    """Tensor name (on disk, or a role) → linear layer of the model; raises AlignmentError naming what has none."""
    linears = text_linears(model)
    result = {}
    for name in names:
        if role_of(name) not in linears:
            raise AlignmentError(
                f"{name}: no linear layer {role_of(name)!r} in {type(model).__name__}; gates act on linear layers of "
                "the text model only, so leave this tensor out of `modules`"
            )
        result[name] = linears[role_of(name)]
    return result


def match_projections(model: Any, names: Iterable[str]) -> dict[str, Projection]:
    """Tensor name (on disk, or a role) → linear layer or fused experts; raises AlignmentError naming what has none."""
    names, stacks = list(names), text_experts(model)
    linears = match_linears(model, [name for name in names if role_of(name) not in stacks])
    return {name: linears[name] if name in linears else stacks[role_of(name)] for name in names}


def _load(auto: Any, path: str | Path, dtype: torch.dtype | str, device: torch.device | str) -> Any:
    try:
        model = auto.from_pretrained(_source(path), dtype=dtype)
    except (ValueError, OSError) as error:
        raise CheckpointError(f"{path}: cannot be loaded as {auto.__name__[len('AutoModelFor') :]}: {error}") from error
    return model.to(device).eval()


def _source(path: str | Path) -> str:
    """A folder as it is, or a hub id; `id@revision` is resolved by the checkpoint index, not here."""
    return str(path)
