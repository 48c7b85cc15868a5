"""DRIFT's prior on a model's gradients: which parameters it pushes, and one push of all of them.

For a hand-written loop:

    bound = bind_prior(prior, model)
    loss.backward()                        # as often as gradients are accumulated
    bound.push(progress=step / steps)      # once per optimiser step, before clipping
    optimizer.step()

Norms and cosines are those of the whole parameter, although no process holds all of Δ (a prior made under torchrun
keeps no values, see `Prior.opened`). Under FSDP2 each process has its shard, and sums of squares and products are
reduced over the mesh before any gradient is changed. Under DDP each process has the Δ of some tensors, pushes these,
and broadcasts their gradients. The code released with the paper hooks every backward pass instead, before gradients are
accumulated: `hook_backward`. Without accumulation both are the same.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from vlmgraft.alignment import Alignment
from vlmgraft.errors import AlignmentError, NumericalError, RecipeError
from vlmgraft.finetuning.parameters import Dense, Holders, LowRank, Pieces, Target, low_rank_layers, plain_role
from vlmgraft.finetuning.prior import Prior, PushVerdict, cosine, push_length
from vlmgraft.hf.modules import ExpertSlice, output_head, role_of, slice_of, text_experts, text_model
from vlmgraft.storage.torchrun import process

BLOCK = 256 * 2**20
"""Bytes of Δ that are on the accelerator at once when Δ is kept on the CPU."""


@dataclass
class Bound:
    """A prior bound to the parameters of one model.

    last: cos(g, Δ) and push strength ‖g' − g‖/‖g‖ of the last push, by VLM tensor name. skipped: pushes left out
    because a loss scale overflowed.
    """

    prior: Prior
    targets: Sequence[Target]
    verdicts: tuple[PushVerdict, ...]
    last: dict[str, tuple[float, float]] = field(default_factory=dict)
    skipped: int = 0

    def push(self, progress: float = 0.0, *, loss_scale: float = 1.0, overflow: bool = False) -> None:
        """Push the existing gradients in place; call it once per optimiser step, before clipping.

        Args:
            progress: share of the training that is done, for the schedule.
            loss_scale: the factor in the gradients (of a float16 gradient scaler).
            overflow: a gradient that is not finite skips the push, as the scaler will skip the step; else it raises.
        Raises:
            NumericalError: a gradient is NaN or infinite; the message names the tensor.
        """
        strength = self.prior.rule.strength_at(progress)
        for block in self._blocks():
            if not self._push(block, [target.pieces() for target in block], strength, loss_scale, overflow):
                self.skipped += 1
                return

    def push_one(self, target: Dense, grad: Tensor, progress: float, loss_scale: float) -> None:
        """Push one gradient in place, as it arrives."""
        pieces = [[(grad, target.direction.to(grad.device))]]
        self._push([target], pieces, self.prior.rule.strength_at(progress), loss_scale, loss_scale != 1.0)

    def moved(self) -> dict[str, float]:
        """⟨W − W_vlm, Δ⟩/‖Δ‖² by tensor name: the share of the distance to the donor, 1 at the donor."""
        products = _stack([target.progress() for target in self.targets])
        _sum_over_shards(products, self.targets)
        return {
            target.delta.name: (value - target.base) / target.delta.norm**2
            for target, value in zip(self.targets, products.tolist(), strict=True)
        }

    def _blocks(self) -> Iterator[list[Target]]:
        """The targets with a gradient: in one block if Δ is on their device, else in blocks whose Δ fits there."""
        block: list[Target] = []
        size = 0
        for target in self.targets:
            if not target.has_gradient():
                continue
            block.append(target)
            size += target.copied
            if size > BLOCK:
                yield block
                block, size = [], 0
        if block:
            yield block

    def _push(
        self, block: Sequence[Target], pieces: list[Pieces], strength: float, loss_scale: float, overflow: bool
    ) -> bool:
        """Push the gradients in `pieces`, those of `block`; False when an overflow leaves them unchanged."""
        table = _stack([_products(of_target) for of_target in pieces])
        _sum_over_shards(table, block)
        squares, dots, delta_squares = table.cpu().unbind(1)
        for target, square in zip(block, squares.tolist(), strict=True):
            if not square < float("inf"):
                if overflow:
                    return False
                raise NumericalError(
                    f"{target.delta.name}: its gradient is {'NaN' if square != square else 'infinite'}, and was not "
                    "pushed; look at the loss of this batch, lower the learning rate or train in bfloat16"
                )
        rule, norms = self.prior.rule, squares.sqrt()
        whole = torch.tensor([target.whole_norm for target in block])
        delta_norms = torch.where(whole > 0, whole, delta_squares.sqrt())
        target_norms = torch.tensor([target.delta.size for target in block]) if rule.rescale else delta_norms
        strengths = strength * torch.tensor([target.delta.share for target in block], dtype=norms.dtype)
        lengths = push_length(rule.mode, strengths, norms, dots, delta_norms, loss_scale * target_norms)
        factors = torch.where(delta_norms > 0, -lengths / delta_norms, 0.0).tolist()
        for of_target, factor in zip(pieces, factors, strict=True):
            for grad, direction in of_target:
                grad.add_(direction, alpha=factor)
        _send_gradients(block)
        cosines, shares = cosine(dots, norms, delta_norms), torch.where(norms > 0, lengths / norms, 0.0)
        for target, *pair in zip(block, cosines.tolist(), shares.tolist(), strict=True):
            self.last[target.delta.name] = (pair[0], pair[1])
        return True


def bind_prior(prior: Prior, model: Any, *, whole: bool = False) -> Bound:
    """Find the trained parameter (or LoRA pair) of every Δ in a model, and put Δ where the prior's `store` says.

    Call it when the model is ready for training: on its device, wrapped by peft, sharded. whole: if several processes
    each train the whole model, every process holds all of Δ and pushes its own gradients; otherwise one process pushes
    for all, so the gradients must be averaged before the push, as DDP does.

    Raises:
        AlignmentError: the model has no parameter for a Δ, another shape, or trains none of them.
        RecipeError: an adapter or a sharding on which the push is not defined; the message says why.
    """
    places, adapters, holders = _Places(model), low_rank_layers(model), Holders(model)
    targets: list[Target] = []
    verdicts = {verdict.name: verdict for verdict in prior.verdicts}
    taken: dict[object, str] = {}
    with prior.values() as value_of:
        for delta in prior.deltas.values():
            role, parameter, part = places.of(delta.name, delta.role, tuple(delta.value.shape))
            key = (id(parameter), part and (part.expert, part.part))
            if key in taken:
                why = f"it shares its parameter with {taken[key]}, which is pushed"
                verdicts[delta.name] = PushVerdict(delta.name, "kept", why)
            elif (trained := parameter if parameter.requires_grad else adapters.get(role)) is None:
                why = "it is frozen: neither it nor an adapter is trained"
                verdicts[delta.name] = PushVerdict(delta.name, "kept", why)
            else:
                holder = None if whole else holders.of(trained, delta)
                value = value_of(delta.name) if holder in (None, process()[0]) else None
                if trained is parameter:
                    targets.append(Dense(delta, parameter, prior.store, part, value, holder))
                elif prior.rule.rescale:
                    raise RecipeError(
                        f"prior.rescale: {delta.name} is trained by an adapter, which has no norm of its own"
                    )
                else:
                    targets.append(LowRank(delta, trained, prior.store, value, holder))
            taken[key] = delta.name
    if not targets:
        raise AlignmentError(
            f"{type(model).__name__}: none of the {len(prior.deltas)} tensors of the prior is trained; unfreeze them, "
            "give the LoRA adapter these modules as targets, or choose other `modules`"
        )
    return Bound(prior, targets, tuple(verdicts.values()))


def check_places(model: Any, alignment: Alignment) -> None:
    """Raise AlignmentError, before a prior is computed, if a model has no parameter for a merged tensor.

    model: of the VLM's class; its weights are not read.
    """
    places = _Places(model)
    for tensor in alignment.merged:
        places.of(tensor.name, str(tensor.role), alignment.vlm.tensors[tensor.name].shape)


class _Places:
    """The parameters of a model's language model, by role."""

    def __init__(self, model: Any) -> None:
        self.kind, self.parameters, self.stacks = type(model).__name__, _parameters(model), text_experts(model)

    def of(self, name: str, role: str, shape: tuple[int, ...]) -> tuple[str, nn.Parameter, ExpertSlice | None]:
        """The role and the parameter of a tensor, and its slice of fused experts, if it is one.

        Layers are numbered as on disk, where cross-attention layers count, which roles leave out. Raises AlignmentError
        if there is no parameter of this shape.
        """
        role = role_of(name) if role_of(name) in self.parameters else role
        parameter, part = self.parameters.get(role), None
        if parameter is None and (part := slice_of(self.stacks, name)) is not None:
            parameter = part.stack.weight
        found = None if parameter is None else tuple((parameter if part is None else part.weight).shape)
        if parameter is None or found != shape:
            actual = "no parameter" if found is None else f"a parameter of shape {found}"
            raise AlignmentError(
                f"{name}: {self.kind} has {actual} in the role {role}, Δ is {shape}; leave it out of `modules`, or "
                "train the VLM that the prior was made for"
            )
        return role, parameter, part


def hook_backward(bound: Bound, state: Callable[[], tuple[float, float]]) -> list[Any]:
    """Push in every backward pass, before the gradient is accumulated, as the released code does; returns the handles.

    state: gives (progress, loss scale) when a gradient arrives. Norms are of this pass, and under DDP of this process.

    Raises:
        RecipeError: for LoRA and for sharded parameters, whose push does not follow from one gradient alone.
    """
    handles = []
    for target in bound.targets:
        if not isinstance(target, Dense) or target.part is not None or target.groups:
            raise RecipeError(
                f"{target.delta.name}: a push in every backward pass is for whole parameters only; push once per step"
            )

        def hook(grad: Tensor, target: Dense = target) -> Tensor:
            progress, loss_scale = state()
            bound.push_one(target, grad := grad.clone(), progress, loss_scale)
            return grad

        handles.append(target.parameter.register_hook(hook))
    return handles


def _parameters(model: Any) -> Mapping[str, nn.Parameter]:
    """Role in the text model → parameter, the head included; the names that wrappers add are removed."""
    named = text_model(model).named_parameters(remove_duplicate=False)
    parameters = {role_of(plain_role(name)): value for name, value in named}
    parameters.update({f"lm_head.{plain_role(name)}": value for name, value in output_head(model).named_parameters()})
    return parameters


def _stack(rows: list[Tensor]) -> Tensor:
    """Rows stacked on one device: a model may be spread over several."""
    return torch.stack([row.to(rows[0].device) for row in rows])


def _products(pieces: Pieces) -> Tensor:
    """(‖g‖², ⟨g, Δ⟩, ‖Δ‖²) of one target in float32, over the part that this process holds."""
    rows = []
    for grad, direction in pieces:
        g, delta = grad.reshape(-1).float(), direction.reshape(-1).float()
        rows.append(torch.stack([torch.dot(g, g), torch.dot(g, delta), torch.dot(delta, delta)]))
    return rows[0] if len(rows) == 1 else torch.stack(rows).sum(0)


def _send_gradients(targets: Sequence[Target]) -> None:
    """Broadcast gradients from the process that pushed them, if one pushes for all."""
    held = [(one, target.holder) for target in targets if target.holder is not None for one in target.parameters()]
    sent = {id(one.grad): (one.grad, holder) for one, holder in held}
    waits: list[Any] = [
        torch.distributed.broadcast(grad, src, async_op=True) for grad, src in sent.values() if grad is not None
    ]
    for wait in waits:
        wait.wait()


def _sum_over_shards(table: Tensor, targets: Sequence[Target]) -> None:
    """Add up rows of sharded targets over their meshes, in place; the same order on every process."""
    groups: dict[Any, list[int]] = {}
    for row, target in enumerate(targets):
        for group in target.groups:
            groups.setdefault(group, []).append(row)
    for group, rows in groups.items():
        part = table[rows]
        torch.distributed.all_reduce(part, group=group)
        table[rows] = part
