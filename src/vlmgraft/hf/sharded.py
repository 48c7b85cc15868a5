"""Loads a model with sharded decoder layers: each process of a group reads its own rows from safetensors.

transformers does the reading (`from_pretrained` with a `DistributedConfig`): the model is made on the meta device,
`fully_shard` decides which rows of every parameter belong to this process, and only those are read, renamed and
converted; if a conversion needs a whole tensor, one tensor at a time is whole. What is outside the decoder layers
(embeddings, head, vision tower: small, and replicated afterwards) is gathered from the shards: no byte is read twice.

transformers' sharding adds hooks that expect its own forward pass, and cannot be undone. The returned model has none:
plain modules, whose decoder layers hold `DTensor` parameters (rows of dimension 0, as `fully_shard` splits them).
"""

from __future__ import annotations

import gc
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, __version__ as transformers_version

from vlmgraft.checkpoint.index import Checkpoint, open_checkpoint
from vlmgraft.errors import RecipeError
from vlmgraft.hf.models import explained, load_config, readable_folder
from vlmgraft.hf.modules import adopt, is_shard, set_tensor, text_model

OLDEST_TORCH = (2, 8)
"""The oldest version with which transformers shards models."""


def vlm_shards(path: str | Path, dtype: torch.dtype, device: torch.device) -> Any:
    """`load_vlm` in shards: every process of the group calls this with the same arguments.

    Raises CheckpointError; RecipeError where the libraries, the device or quantised weights do not allow it.
    """
    return _load_shards(AutoModelForImageTextToText, path, dtype, device)


def text_shards(path: str | Path, dtype: torch.dtype, device: torch.device) -> Any:
    """`load_text_model` in shards, as `vlm_shards`."""
    return _load_shards(AutoModelForCausalLM, path, dtype, device)


def _load_shards(auto: Any, path: str | Path, dtype: torch.dtype, device: torch.device) -> Any:
    """Load in evaluation mode, as plain modules with sharded decoder layers."""
    checkpoint = open_checkpoint(path)
    check_sharding(device, checkpoint)
    folder = readable_folder(checkpoint.path)
    from transformers.distributed import DistributedConfig

    config = load_config(folder)
    with explained(path, "its class cannot be made from its config.json"), torch.device("meta"):
        model = auto.from_config(config, dtype=dtype)
    plan = {f"{_name_of(model, text_model(model))}.layers.*": "free_full_weight"}
    sharded = DistributedConfig(fsdp_size=torch.distributed.get_world_size(), fsdp_plan=plan)
    with explained(path, "cannot be loaded in shards; one process may load it whole"):
        loaded = auto.from_pretrained(
            folder, dtype=dtype, distributed_config=sharded, trust_remote_code=False, use_safetensors=True
        )
    adopt(model, loaded)
    inside = {id(parameter) for layer in text_model(model).layers for parameter in layer.parameters()}
    gathered: dict[int, nn.Parameter] = {}
    for name, parameter in [*model.named_parameters(remove_duplicate=False)]:
        if id(parameter) in inside or not is_shard(parameter):
            continue
        if id(parameter) not in gathered:
            gathered[id(parameter)] = nn.Parameter(parameter.full_tensor(), requires_grad=False)
        set_tensor(model, name, gathered[id(parameter)])
    model.generation_config = loaded.generation_config
    del loaded
    gc.collect()  # hooks and modules refer to each other
    return model.eval()


def check_sharding(device: torch.device, *checkpoints: Checkpoint) -> None:
    """Raise RecipeError if the installed libraries or the device cannot shard, or a checkpoint is quantised."""
    try:
        from transformers.distributed import DistributedConfig

        fields = DistributedConfig.__dataclass_fields__
    except ImportError:
        fields = {}
    if "fsdp_plan" not in fields:
        raise RecipeError(f"gates of several processes need transformers 5.23 or newer, this is {transformers_version}")
    if tuple(int(part) for part in torch.__version__.split(".")[:2]) < OLDEST_TORCH:
        raise RecipeError(f"gates of several processes need torch 2.8 or newer, this is {torch.__version__}")
    if find_spec("accelerate") is None:
        raise RecipeError("gates of several processes need accelerate: pip install accelerate")
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    kind = accelerator.type if accelerator else "cpu"
    if kind != device.type:
        raise RecipeError(
            f"--device {device.type}: transformers shards models on this machine's {kind} only; run one "
            "process, or hide the others from it (CUDA_VISIBLE_DEVICES=)"
        )
    for checkpoint in checkpoints:
        if checkpoint.packed:
            raise RecipeError(
                f"{checkpoint.path}: its weights are quantised, and are not read in shards; run one process, or give a "
                "copy in 16 bits"
            )


def _name_of(model: nn.Module, part: nn.Module) -> str:
    return next(name for name, module in model.named_modules() if module is part)
