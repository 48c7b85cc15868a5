"""A PEFT LoRA adapter presented as its merged model, W + s · B · A, from headers alone.

s is lora_alpha / r, or lora_alpha / √r with `use_rslora`. r comes from a matrix's shape; `alpha_pattern` may set
another alpha for it. Modules that were trained in full (`modules_to_save`) replace the base's. The sums stay in
float32, whereas PEFT's `merge_and_unload` rounds them to the base's dtype.
"""

from __future__ import annotations

import math
import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vlmgraft.checkpoint.header import ITEM_SIZES, Packed, TensorInfo
from vlmgraft.errors import CheckpointError

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_PAIR = re.compile(r"(.+)\.lora_(embedding_)?([AB])(?:\.weight)?")
_KNOWN = {
    "r", "lora_alpha", "lora_dropout", "use_rslora", "rank_pattern", "alpha_pattern", "target_modules", "bias",
    "exclude_modules", "modules_to_save", "layers_to_transform", "layers_pattern", "fan_in_fan_out", "task_type",
    "init_lora_weights", "peft_type", "peft_version", "auto_mapping", "base_model_name_or_path", "revision",
    "inference_mode", "megatron_core", "loftq_config", "eva_config", "corda_config", "lora_ga_config",
    "qalora_group_size", "ensure_weight_tying", "runtime_config",
}  # fmt: skip
"""Settings that keep a matrix at W + s · B · A. Any other (use_dora, target_parameters, …) is refused if it is set."""
_PLAIN = (True, False, "gaussian", "orthogonal", "eva")
"""Values of init_lora_weights that do not change the base's weights."""


@dataclass(frozen=True)
class Adapted(Packed):
    """The sum values + scaling · B · A of its three `parts`; `turned`: B · A is transposed."""

    scaling: float = 1.0
    turned: bool = False


def adapted(
    folder: Path, config: Mapping[str, Any], header: Mapping[str, TensorInfo], base: Mapping[str, TensorInfo]
) -> tuple[dict[str, TensorInfo], dict[str, Packed]]:
    """The base's tensors with the adapter in `folder` applied, and an `Adapted` for each sum; both by name on disk.

    Raises CheckpointError, with the command that merges the adapter, if the adapter does anything else.
    """
    odd = sorted(key for key, value in config.items() if value and key not in _KNOWN)
    odd += [f"{key} {config[key]!r:.40}" for key, plain in (("peft_type", ("LORA",)), ("init_lora_weights", _PLAIN))
            if config.get(key, plain[0]) not in plain]  # fmt: skip
    if odd:
        raise _refused(folder, f"its adapter_config.json sets {', '.join(odd)}")
    whole, pairs = dict(base), dict[str, dict[str, TensorInfo]]()
    for key, info in header.items():
        inside = key.removeprefix("base_model.model.").replace(".base_layer.", ".")
        if match := _PAIR.fullmatch(inside):
            pairs.setdefault(f"{match[1]}.weight", {})[match[3]] = info
        elif inside in base:
            whole[inside] = info._replace(name=inside)
        else:
            raise _refused(folder, f"{key} has no place in its base model")
    packed: dict[str, Packed] = {}
    for name, parts in pairs.items():
        if len(parts) < 2 or name not in whole or any(len(info.shape) != 2 for info in (*parts.values(), whole[name])):
            raise _refused(folder, f"{next(iter(parts.values())).name} and {name} of its base are no matrix and a pair")
        values, (rank, inner), (outer, also) = whole[name], parts["A"].shape, parts["B"].shape
        turned = bool(config.get("fan_in_fan_out")) or "lora_embedding_" in parts["A"].name
        if rank != also or values.shape != ((inner, outer) if turned else (outer, inner)):
            raise _refused(
                folder, f"{parts['B'].name} {[outer, also]} times A {[rank, inner]} is not {[*values.shape]}"
            )
        packed[name] = Adapted({"values": values, **parts}, scaling=_scaling(folder, config, name, rank), turned=turned)
        whole[name] = values._replace(dtype="F32", nbytes=values.elements * ITEM_SIZES["F32"])
    return whole, packed


def _scaling(folder: Path, config: Mapping[str, Any], name: str, rank: int) -> float:
    """The scaling s of a matrix. A key of `alpha_pattern` matches a module's whole name, or its end after a dot."""
    module, patterns = name.removesuffix(".weight"), config.get("alpha_pattern") or {}
    try:
        found = (value for key, value in patterns.items() if re.fullmatch(rf"(.*\.)?({key})", module))
        alpha = float(next(found, config.get("lora_alpha", 8)))
    except (AttributeError, TypeError, ValueError, re.error) as error:
        raise CheckpointError(f"{folder / CONFIG}: no lora_alpha for {module} ({error!s:.80}); mend it") from None
    return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


def _refused(folder: Path, why: str) -> CheckpointError:
    return CheckpointError(
        f"{folder}: an adapter that is not applied while reading ({why:.300}); merge it with `{merging(folder)}` "
        "and give that folder"
    )


def merging(folder: Path) -> str:
    """The shell command that merges an adapter into its base with PEFT and saves the result in a folder beside it."""
    return (
        'python -c "import sys; from peft import AutoPeftModelForCausalLM as M; '
        "M.from_pretrained(sys.argv[1], dtype='auto').merge_and_unload().save_pretrained(sys.argv[2])\" "
        f"{shlex.quote(str(folder))} {shlex.quote(f'{folder}-merged')}"
    )
