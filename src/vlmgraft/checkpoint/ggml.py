"""A GGUF file of a text model, presented as the checkpoint that it was converted from.

Names, settings and row order (llama.cpp permutes the heads of Llama's q and k) are restored with transformers' own
tables; the package `gguf` reads the file and dequantises one tensor at a time. Conversions that combine several tensors
(experts) or use other layouts are refused. Both libraries are imported only when a GGUF file is opened.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlmgraft.checkpoint.header import Packed, TensorInfo
from vlmgraft.errors import CheckpointError
from vlmgraft.storage.limits import MAX_LAYERS

if TYPE_CHECKING:
    import numpy

SUFFIX = ".gguf"
GGUF = {"quant_method": "gguf"}
LLAMA_IN_GGUF = ("mistral", "ministral", "ministral3", "internlm3")
"""Types of text models besides Llama whose GGUF files name the architecture llama."""
_UNTURNED = ("TensorProcessor", "LlamaTensorProcessor", "Gemma2TensorProcessor")
"""transformers' classes that reverse a conversion tensor by tensor."""
_FAILURES = (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)
"""Exceptions of gguf and transformers for damaged numbers or unknown architectures, since they build the model from
whatever the header says. Only their calls are in blocks that catch these."""
_ROPE = "rope_freqs.weight"
"""A rotary table that transformers computes itself."""


@dataclass(frozen=True)
class Ggml(Packed):
    """One tensor of a GGUF file. kind: its number format, such as "Q4_K". shape: in transformers' layout. architecture,
    heads (query, key-value): needed to reverse its conversion."""

    kind: str = "F32"
    shape: tuple[int, ...] = ()
    architecture: str = ""
    heads: tuple[int, int] = (1, 1)

    @property
    def error(self) -> str:
        """The largest rounding error of a value, in words."""
        return "" if self.kind in ("F32", "F16", "BF16") else f"half a step of {self.kind}"


def gguf_tensors(file: Path) -> tuple[dict[str, TensorInfo], dict[str, Packed], dict[str, Any]]:
    """A GGUF file's tensors by transformers' names, how each is stored, and the config.

    Raises:
        CheckpointError: gguf is not installed, the file is damaged, or its layout cannot be reversed tensor by tensor.
    """
    tensors, config, architecture, names = _parsed(file)
    if missing := [tensor.name for tensor in tensors if tensor.name not in names and tensor.name != _ROPE]:
        raise _not_read(file, f"{architecture} has no {missing[0]}")
    heads = config["num_attention_heads"], config.get("num_key_value_heads") or config["num_attention_heads"]
    if not all(isinstance(count, int) for count in heads):
        raise _not_read(file, "another number of heads in each layer")
    found: dict[str, TensorInfo] = {}
    packed: dict[str, Packed] = {}
    for tensor in tensors:
        if tensor.name == _ROPE:
            continue
        name, kind = names[tensor.name], tensor.tensor_type.name
        shape = tuple(int(size) for size in reversed(tensor.shape))
        begin, nbytes = int(tensor.data_offset), int(tensor.n_bytes)
        part = TensorInfo(tensor.name, "U8", (nbytes,), file, begin, nbytes)
        found[name] = TensorInfo(name, "F32", shape, file, begin, 4 * int(tensor.n_elements))
        packed[name] = Ggml({"values": part}, kind=kind, shape=shape, architecture=architecture, heads=heads)
    return found, packed, {**config, "quantization_config": GGUF}


def _parsed(file: Path) -> tuple[list[Any], dict[str, Any], str, dict[str, str]]:
    """A file as gguf and transformers read it: tensors, config, architecture, and transformers' names by the file's."""
    with _explained(file):
        import gguf
        import transformers.modeling_gguf_pytorch_utils as library

        try:
            reader = gguf.GGUFReader(file)
        except (LookupError, ValueError) as error:
            raise CheckpointError(f"{file}: truncated, or no GGUF file ({error!s:.200}); download it again") from None
        config = library.load_gguf_checkpoint(str(file))["config"]
        architecture = str(library.read_field(reader, "general.architecture")[0])
        processor = library.TENSOR_PROCESSORS.get(architecture, library.TensorProcessor)(config=config)
    if absent := [key for key in ("num_hidden_layers", "num_attention_heads") if not config.get(key)]:
        raise _not_read(file, f"its header has no {absent[0]}")
    if config["num_hidden_layers"] > min(MAX_LAYERS, len(reader.tensors)):
        raise _not_read(file, f"{config['num_hidden_layers']} layers in {len(reader.tensors)} tensors")
    if type(processor).__name__ not in _UNTURNED or any("_exps" in tensor.name for tensor in reader.tensors):
        raise _not_read(file, f"{architecture} with other layouts or experts")
    with _explained(file):
        names = _names(config, processor, library)
    return reader.tensors, config, architecture, names


def _names(config: dict[str, Any], processor: Any, library: Any) -> dict[str, str]:
    """Name in the file → name in transformers' model, which is built without memory for weights."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    settings = {key: value for key, value in config.items() if key not in ("model_type", "_model_name_or_path")}
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(config["model_type"], **settings))
    return dict(library.get_gguf_hf_weights_map(model, processor))


def gguf_matrix(packed: Ggml, data: numpy.ndarray) -> numpy.ndarray:
    """The float32 tensor in transformers' layout, from its bytes in the file."""
    part = packed.parts["values"]
    with _explained(part.file):
        import gguf
        import transformers.modeling_gguf_pytorch_utils as library

        kind = gguf.GGMLQuantizationType[packed.kind]
        weights = gguf.dequantize(data.reshape(gguf.quant_shape_to_byte_shape(packed.shape, kind)), kind)
        config = dict(zip(("num_attention_heads", "num_key_value_heads"), packed.heads, strict=True))
        processor = library.TENSOR_PROCESSORS.get(packed.architecture, library.TensorProcessor)(config=config)
        return processor.process(weights=weights, name=part.name).weights


@contextmanager
def _explained(file: Path) -> Iterator[None]:
    """Turn the libraries' errors into CheckpointError with the command that converts the file by transformers."""
    from huggingface_hub.errors import StrictDataclassError

    try:
        yield
    except ImportError:
        raise CheckpointError(
            f"{file}: GGUF files are read with the package gguf: pip install 'vlmgraft[gguf]'"
        ) from None
    except (*_FAILURES, StrictDataclassError) as error:
        raise _not_read(file, f"{type(error).__name__}: {error!s:.200}") from None


def _not_read(file: Path, why: str) -> CheckpointError:
    folder, out = shlex.quote(str(file.parent)), shlex.quote(str(file.with_suffix("")))
    return CheckpointError(
        f"{file}: is not read tensor by tensor ({why}); convert it with "
        '`python -c "import sys; from transformers import AutoModelForCausalLM as M; m = M.from_pretrained('
        "sys.argv[1], gguf_file=sys.argv[2]); c = M.from_config(m.config); c.load_state_dict(m.state_dict()); "
        f'c.config.quantization_config = None; c.save_pretrained(sys.argv[3])" {folder} {shlex.quote(file.name)} '
        f"{out}` and give that folder"
    )
