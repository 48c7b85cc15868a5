"""Loading transformers models, configs and processors from folders and hub ids; no code of a checkpoint ever runs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoProcessor,
    AutoTokenizer,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from vlmgraft.checkpoint.files import load_json, refuse_special
from vlmgraft.checkpoint.folder import is_folder
from vlmgraft.checkpoint.hub import fetch
from vlmgraft.checkpoint.index import open_checkpoint, read_config
from vlmgraft.errors import CheckpointError
from vlmgraft.hf.limits import refuse_growth
from vlmgraft.storage.limits import MAX_TOKENIZER

GENERIC_TOKENIZERS = ("TokenizersBackend", "PreTrainedTokenizerFast")
PROCESSOR_FILES = ("processor_config.json", "preprocessor_config.json")
"""Files that a processor saves beside its tokenizer; transformers 4 wrote only the second for many classes."""
LOADING_FAILURES = (
    ArithmeticError,  # a division by a number of heads that is zero
    AssertionError,  # torch's own, such as a padding index beyond the vocabulary
    AttributeError,  # a config's number or list where transformers expects a mapping
    ImportError,  # a class that needs a library that is not installed
    LookupError,  # an unknown activation or model type
    OSError,
    RuntimeError,  # shapes that do not fit
    SafetensorError,
    StrictDataclassError,  # a config's value of another type
    TypeError,
    ValueError,
)
"""What transformers raises for wrong files; only calls of transformers run where these are caught."""


def load_vlm(path: str | Path, dtype: torch.dtype | str = "auto", device: torch.device | str = "cpu") -> Any:
    """The vision-language model of a folder or hub id, in evaluation mode; raises CheckpointError."""
    return _load(AutoModelForImageTextToText, path, dtype, device)


def load_text_model(path: str | Path, dtype: torch.dtype | str = "auto", device: torch.device | str = "cpu") -> Any:
    """The text LLM of a folder or hub id, in evaluation mode; raises CheckpointError."""
    return _load(AutoModelForCausalLM, path, dtype, device)


def load_config(path: str | Path) -> Any:
    """The transformers config of a folder or hub id; raises CheckpointError."""
    folder = _folder(path)
    with explained(path, "its config.json is not one that transformers reads"):
        return AutoConfig.from_pretrained(folder, trust_remote_code=False)


def empty_vlm(path: str | Path) -> Any:
    """The vision-language model of a folder or hub id by its config alone: modules and shapes, no memory for weights.

    Raises CheckpointError.
    """
    config = load_config(path)
    with explained(path, "its class cannot be made from its config.json"), torch.device("meta"):
        return AutoModelForImageTextToText.from_config(config)


def load_processor(path: str | Path) -> Any:
    """The processor of a VLM, or the tokenizer of a text LLM; raises CheckpointError.

    If a text folder declares the generic tokenizer class, that class is used: `AutoTokenizer` of transformers 5
    replaces it with the class of the model type, which misreads a tokenizer.json that is not byte-level BPE.
    """
    source = _folder(path)
    config = source / "tokenizer_config.json"
    generic = False
    seen = [source / name for name in PROCESSOR_FILES if (source / name).is_file()]
    if config.is_file() and not seen:
        generic = load_json(config, MAX_TOKENIZER).get("tokenizer_class") in GENERIC_TOKENIZERS
    with explained(path, "no processor or tokenizer can be loaded"):
        if generic:
            return PreTrainedTokenizerFast.from_pretrained(source)
        try:
            found = AutoProcessor.from_pretrained(source, trust_remote_code=False)
        except (ValueError, OSError) as error:
            if seen:
                raise
            try:
                return AutoTokenizer.from_pretrained(source, trust_remote_code=False)
            except (ValueError, OSError):
                raise error from None
    if seen and isinstance(found, PreTrainedTokenizerBase):
        raise CheckpointError(
            f"{source}: has no processor that this transformers knows ({seen[0].name} names "
            f"{load_json(seen[0]).get('processor_class')!r:.80}); upgrade transformers, or take its files from the "
            "release of its weights"
        )
    return found


def _load(auto: Any, path: str | Path, dtype: torch.dtype | str, device: torch.device | str) -> Any:
    """Load from safetensors only, after their headers were checked; code of the checkpoint never runs."""
    folder = readable_folder(open_checkpoint(path).path)
    with explained(path, f"cannot be loaded as {auto.__name__[len('AutoModelFor') :]}"):
        model = auto.from_pretrained(folder, dtype=dtype, trust_remote_code=False, use_safetensors=True)
    return model.to(device).eval()


def _folder(path: str | Path) -> Path:
    """A folder that transformers may read, or the one to which a hub id's small files were downloaded."""
    folder = Path(path) if is_folder(path) or isinstance(path, Path) else fetch(path, headers_only=True)
    if folder.is_dir():
        refuse_special(folder)
        read_config(folder)
        readable_folder(folder)
    return folder


def readable_folder(folder: Path) -> Path:
    """Return a checkpoint's folder if transformers would load only what it holds; else raise CheckpointError."""
    _refuse_adapter(folder)
    refuse_growth(folder)
    return folder


def _refuse_adapter(folder: Path) -> None:
    """Refuse adapters: transformers would apply one to the model, or load another model as its base."""
    if (folder / "adapter_config.json").exists():
        raise CheckpointError(
            f"{folder / 'adapter_config.json'}: this folder is or has an adapter (its base_model_name_or_path names "
            "another model); merge it with PEFT's merge_and_unload and save the result, or remove the file"
        )


@contextmanager
def explained(path: str | Path, what: str) -> Iterator[None]:
    """Turn errors of transformers about a folder into CheckpointError; only transformers is called inside."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except LOADING_FAILURES as error:
        if "trust_remote_code" in str(error):
            raise CheckpointError(
                f"{path}: auto_map in its files names Python code of the checkpoint's own, which is never run; take "
                "the release for transformers' own classes (OpenGVLab/InternVL3-8B-hf for OpenGVLab/InternVL3-8B)"
            ) from None
        reason = f"{type(error).__name__}: {error}"
        raise CheckpointError(f"{path}: {what} ({reason:.600}); look at the files named, or download again") from error
