"""Loading transformers models, and finding the text model's linear layers inside any of them.

Names on disk are not module names: a linear layer is found by its role in the text model, such as
"layers.3.self_attn.q_proj.weight", which is the end of its tensor name in every family.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoProcessor,
    AutoTokenizer,
    PreTrainedTokenizerFast,
)

from vlmgraft.checkpoint.files import load_json, refuse_special
from vlmgraft.checkpoint.hub import fetch
from vlmgraft.checkpoint.index import open_checkpoint, read_config
from vlmgraft.errors import AlignmentError, CheckpointError

MAX_TOKENIZER = 100_000_000
"""Bytes of a tokenizer's config: it may list every added token."""
_ROLE = re.compile(r"(?:^|\.)(layers\.\d+\..+)$")


def load_vlm(path: str | Path, dtype: torch.dtype | str = "auto", device: torch.device | str = "cpu") -> Any:
    """The vision-language model of a folder or hub id, in evaluation mode; raises CheckpointError."""
    return _load(AutoModelForImageTextToText, path, dtype, device)


def load_text_model(path: str | Path, dtype: torch.dtype | str = "auto", device: torch.device | str = "cpu") -> Any:
    """The text LLM of a folder or hub id, in evaluation mode; raises CheckpointError."""
    return _load(AutoModelForCausalLM, path, dtype, device)


def load_config(path: str | Path) -> Any:
    """The transformers config of a folder or hub id; raises CheckpointError."""
    with _explained(path, "its config.json is not one that transformers reads"):
        return AutoConfig.from_pretrained(_folder(path), trust_remote_code=False)


def load_processor(path: str | Path) -> Any:
    """The processor of a VLM, or the tokenizer of a text LLM; raises CheckpointError.

    A text folder that declares the generic tokenizer class is taken at its word: `AutoTokenizer` of transformers 5
    puts the class of the model type in its place, which reads a tokenizer.json that is not byte-level BPE wrongly.
    """
    source = _folder(path)
    config = source / "tokenizer_config.json"
    with _explained(path, "no processor or tokenizer can be loaded"):
        if config.is_file() and not (source / "processor_config.json").is_file():
            declared = load_json(config, MAX_TOKENIZER).get("tokenizer_class")
            if declared in ("TokenizersBackend", "PreTrainedTokenizerFast"):
                return PreTrainedTokenizerFast.from_pretrained(source)
        try:
            return AutoProcessor.from_pretrained(source, trust_remote_code=False)
        except (ValueError, OSError) as error:
            try:
                return AutoTokenizer.from_pretrained(source, trust_remote_code=False)
            except (ValueError, OSError):
                raise error from None


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
    """Safetensors only, headers checked before transformers sees them; code of the checkpoint never runs."""
    folder = open_checkpoint(path).path
    _refuse_adapter(folder)
    with _explained(path, f"cannot be loaded as {auto.__name__[len('AutoModelFor') :]}"):
        model = auto.from_pretrained(folder, dtype=dtype, trust_remote_code=False, use_safetensors=True)
    return model.to(device).eval()


def _folder(path: str | Path) -> Path:
    """A folder that transformers may read, or the one to which a hub id's small files were downloaded."""
    folder = Path(path) if Path(path).is_dir() or isinstance(path, Path) else fetch(path, headers_only=True)
    if folder.is_dir():
        refuse_special(folder)
        read_config(folder)
        _refuse_adapter(folder)
    return folder


def _refuse_adapter(folder: Path) -> None:
    """transformers would put an adapter on the model, or load another model to put it on."""
    if (folder / "adapter_config.json").exists():
        raise CheckpointError(
            f"{folder / 'adapter_config.json'}: this folder is or has an adapter (its base_model_name_or_path names "
            "another model); merge it with PEFT's merge_and_unload and save the result, or remove the file"
        )


@contextmanager
def _explained(path: str | Path, what: str) -> Iterator[None]:
    """What transformers raises over a folder, as CheckpointError: whatever its files say, it is not our mistake."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except (
        ArithmeticError,
        AssertionError,
        AttributeError,
        ImportError,
        LookupError,
        OSError,
        RuntimeError,
        SafetensorError,
        TypeError,
        ValueError,
    ) as error:
        if "trust_remote_code" in str(error):
            raise CheckpointError(
                f"{path}: auto_map in its files names Python code of the checkpoint's own, which is never run; take "
                "the release for transformers' own classes (OpenGVLab/InternVL3-8B-hf for OpenGVLab/InternVL3-8B)"
            ) from None
        said = f"{type(error).__name__}: {error}"
        raise CheckpointError(f"{path}: {what} ({said:.600}); look at the files named, or download again") from error
