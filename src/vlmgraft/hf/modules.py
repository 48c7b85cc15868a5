"""Parts of a loaded transformers model: its text model, output head and linear layers, by role; which are sharded.

Names on disk are not module names: a linear layer is found by its role in the text model, such as
"layers.3.self_attn.q_proj.weight", which is the end of its tensor name in every family.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING, Any, TypeGuard

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from vlmgraft.alignment.families import renamed
from vlmgraft.errors import AlignmentError, CheckpointError

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

_EXPERT = re.compile(r"(layers\.\d+\..*\bexperts\.)(\d{1,9})\.(\w+)\.weight")
_ROLE = re.compile(r"(?:^|\.)(?:layers|blocks)\.(\d+)\.(.+)$")


def tokenizer_of(processor: Any) -> Any:
    """The tokenizer of a processor; a tokenizer is returned as it is."""
    return getattr(processor, "tokenizer", processor)


def text_model(model: Any) -> Any:
    """The decoder stack of the language model: the module with token embeddings and as many layers as the text
    configuration says. Raises AlignmentError when none or several fit.

    Vision towers have `layers` too, but no `embed_tokens`; a suffix alone would not tell them apart. In Nemotron-H,
    whose token embeddings have another name, it is the stack with an embedding layer among its children.
    """
    depth = getattr(model.config.get_text_config(decoder=True), "num_hidden_layers", None)
    if depth is None:
        raise AlignmentError(f"{type(model).__name__}: its config names no text model with num_hidden_layers")
    stacks = [(module, dict(module.named_children())) for module in model.modules()]
    stacks = [
        (module, children)
        for module, children in stacks
        if isinstance(layers := children.get("layers"), nn.ModuleList) and len(layers) == depth
    ]
    candidates = [module for module, children in stacks if "embed_tokens" in children] or [
        module for module, children in stacks if any(isinstance(child, nn.Embedding) for child in children.values())
    ]
    if len(candidates) != 1:
        raise AlignmentError(
            f"{type(model).__name__}: {len(candidates)} modules look like a text model of {depth} layers"
        )
    return candidates[0]


def hook_states(module: nn.Module, use: Callable[[Tensor], Tensor | None]) -> RemovableHandle:
    """Pass the hidden states that a layer or block returns, its first output, to `use`, which may return replacements;
    until the handle, a context manager, is left."""

    def hook(module: nn.Module, inputs: Any, output: Any) -> Any:
        states, *others = output if isinstance(output, tuple) else (output,)
        changed = use(states)
        return (changed, *others) if changed is not None and isinstance(output, tuple) else changed

    return module.register_forward_hook(hook)


def output_head(model: Any) -> nn.Module:
    """The layer from hidden states to logits."""
    head = model.get_output_embeddings()
    if head is None:
        raise AlignmentError(f"{type(model).__name__} has no output head; load it with its language-model class")
    return head


def text_linears(model: Any) -> dict[str, nn.Linear]:
    """Role → linear layer, for every linear layer inside the decoder layers."""
    return {
        role_of(f"{name}.weight"): module
        for name, module in text_model(model).named_modules()
        if name.startswith("layers.") and isinstance(module, nn.Linear)
    }


@dataclass(frozen=True)
class ExpertStack:
    """One parameter of a module of fused experts, [experts, out, in], which a gated projection can replace."""

    module: nn.Module
    key: str

    @property
    def weight(self) -> nn.Parameter:
        """The parameter itself."""
        return getattr(self.module, self.key)


@dataclass(frozen=True)
class ExpertSlice:
    """The matrix [out, in] of one expert, a tensor of its own on disk, inside fused experts: number `part` of the
    `parts` matrices stacked along the rows there (gate, up)."""

    stack: ExpertStack
    expert: int
    part: int = 0
    parts: int = 1

    @property
    def weight(self) -> Tensor:
        """A view of the fused parameter."""
        return self.of(self.stack.weight.detach())

    def of(self, fused: Tensor) -> Tensor:
        """A view of this matrix in a tensor of the fused parameter's shape."""
        return fused[self.expert].chunk(self.parts)[self.part]


Projection = nn.Linear | ExpertStack | ExpertSlice


def text_experts(model: Any) -> dict[str, ExpertStack]:
    """Role → fused experts, for every three-dimensional parameter inside the decoder layers."""
    stacks = {}
    for name, module in text_model(model).named_modules():
        for key, parameter in module.named_parameters(recurse=False):
            if name.startswith("layers.") and parameter.ndim == 3 and "conv" not in name:
                stacks[role_of(f"{name}.{key}")] = ExpertStack(module, key)
    return stacks


def role_of(name: str) -> str:
    """The role of a tensor of the text model, from its name on disk; the name itself outside decoder layers."""
    match = _ROLE.search(name)
    return f"layers.{match[1]}.{renamed(match[2])}" if match else name


def match_linears(model: Any, names: Iterable[str]) -> dict[str, nn.Linear]:
    """Tensor name (on disk, or a role) → linear layer of the model; raises AlignmentError for a tensor without one."""
    linears = text_linears(model)
    result = {}
    for name in names:
        if role_of(name) not in linears:
            if ".experts." in name:
                why = "its experts have other names, or another layout, in the model"
            else:
                why = "gates act on linear layers and fused experts of the text model only"
            raise AlignmentError(
                f"{name}: no linear layer {role_of(name)!r} in {type(model).__name__}: {why}; leave it out "
                "of `modules`, such as modules: [attention]"
            )
        result[name] = linears[role_of(name)]
    return result


def match_projections(model: Any, names: Iterable[str]) -> dict[str, Projection]:
    """Tensor name (on disk, or a role) → linear layer, fused experts, or one expert's matrix in them; raises
    AlignmentError naming a tensor without one."""
    stacks = text_experts(model)
    found: dict[str, Projection | None] = {name: stacks.get(role_of(name)) or slice_of(stacks, name) for name in names}
    linears = match_linears(model, [name for name, projection in found.items() if projection is None])
    return {name: projection or linears[name] for name, projection in found.items()}


def slice_of(stacks: Mapping[str, ExpertStack], name: str) -> ExpertSlice | None:
    """The slice of fused experts [experts, out, in] that is stored on disk as `name`; None if there is none."""
    match = _EXPERT.fullmatch(role_of(name))
    if match is None:
        return None
    before, expert, kind = match[1], int(match[2]), match[3]
    halves = {"gate_proj": 0, "up_proj": 1}
    stack = stacks.get(before + kind)
    parts, part = 1, 0
    if stack is None and kind in halves:
        stack, parts, part = stacks.get(f"{before}gate_up_proj"), 2, halves[kind]
    if stack is None or expert >= len(stack.weight) or getattr(stack.module, "is_transposed", False):
        return None
    return ExpertSlice(stack, expert, part, parts)


def put(projection: Projection, weight: Tensor) -> Tensor:
    """Replace a projection's weight; returns the previous one."""
    if isinstance(projection, ExpertSlice):
        before = projection.weight.clone()
        projection.weight.copy_(weight)
        return before
    before, projection.weight.data = projection.weight.data, weight.to(projection.weight)
    return before


def parameter_of(projection: Projection) -> tuple[nn.Module, str]:
    """The module that holds a projection's weight, and the weight's name in it."""
    projection = projection.stack if isinstance(projection, ExpertSlice) else projection
    return (projection.module, projection.key) if isinstance(projection, ExpertStack) else (projection, "weight")


def is_shard(tensor: Tensor) -> TypeGuard[DTensor]:
    """Whether a tensor is a process's part of a larger one."""
    if not torch.distributed.is_available():
        return False
    from torch.distributed.tensor import DTensor

    return isinstance(tensor, DTensor)


def runs_on(parameter: Tensor) -> torch.device:
    """The device that runs a layer with this parameter; for a shard, which may be in host memory, its mesh's device."""
    return torch.device(parameter.device_mesh.device_type) if is_shard(parameter) else parameter.device


def is_sharded(model: Any) -> bool:
    """Whether the model's decoder layers are sharded."""
    return any(is_shard(parameter) for parameter in text_model(model).layers.parameters())


def unwrapped(model: Any) -> Any:
    """The same model in new modules without hooks, on the same tensors."""
    with torch.device("meta"):
        twin = type(model)(model.config)
    adopt(twin, model)
    twin.generation_config = model.generation_config
    return twin.train(model.training)


def adopt(model: nn.Module, source: nn.Module) -> None:
    """Take over all parameters (without gradient) and buffers of a model of the same class; tied tensors stay tied.

    Raises CheckpointError where the model has a tensor that `source` lacks.
    """
    taken: dict[int, nn.Parameter] = {}
    for name, parameter in source.named_parameters(remove_duplicate=False):
        if id(parameter) not in taken:
            taken[id(parameter)] = nn.Parameter(parameter.detach(), requires_grad=False)
        set_tensor(model, name, taken[id(parameter)])
    for name, buffer in source.named_buffers(remove_duplicate=False):
        set_tensor(model, name, buffer)
    rest = [name for name, tensor in chain(model.named_parameters(), model.named_buffers()) if tensor.is_meta]
    if rest:
        raise CheckpointError(f"{rest[0]}: is in {type(model).__name__}, but not in what was loaded of it")


def set_tensor(model: nn.Module, name: str, tensor: Tensor) -> None:
    """Set a parameter or buffer by its name in `named_parameters` or `named_buffers`."""
    parent, _, key = name.rpartition(".")
    setattr(model.get_submodule(parent), key, tensor)
