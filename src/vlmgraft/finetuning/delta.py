"""Δ of DRIFT's prior, streamed from checkpoint folders: donor − VLM, donor − base, or a gated task vector.

One tensor of each checkpoint is in memory at a time; only Δ itself is kept, by default in bfloat16. When several
processes train, Δ is not kept either: it is measured and checked here, and computed again, tensor by tensor, when the
prior is bound to parameters, of which a process may hold a part.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from vlmgraft.alignment import AlignedTensor, Alignment, align, assemble
from vlmgraft.alignment.select import selects
from vlmgraft.checkpoint.index import open_checkpoint
from vlmgraft.checkpoint.reader import Reader
from vlmgraft.errors import AlignmentError, WeightsError
from vlmgraft.finetuning.prior import Delta, Mode, Prior, PushRule, PushVerdict, Schedule, Storage
from vlmgraft.spectral.factor_store import FactorStore, check_gates, sources_of_factors
from vlmgraft.spectral.factors import Factors
from vlmgraft.spectral.gate_store import load_gates
from vlmgraft.spectral.gates import Gates
from vlmgraft.storage.listed import listed
from vlmgraft.storage.torchrun import rank_and_world

Minus = Literal["vlm", "base"]
ALIKE: Mapping[str, float] = {}
"""No shares: every tensor gets the full strength."""


class _Source(NamedTuple):
    """The source of Δ. derive: Δ from a tensor and the VLM's values of it; None for a tensor without Δ. digests: of
    everything read so far, by checkpoint and tensor. blame: the name of the tensor that makes a Δ not finite."""

    derive: Callable[[AlignedTensor, Tensor], Tensor | None]
    digests: Callable[[], Mapping[str, Mapping[str, str]]]
    blame: Callable[[AlignedTensor, Tensor], str]


def load_prior(
    vlm: str | Path,
    donor: str | Path,
    donor_base: str | Path | None = None,
    *,
    modules: Sequence[str] | Mapping[str, float] = ("attention",),
    layers: str | int | Sequence[int] = "all",
    mode: Mode = "adaptive",
    strength: float = 1.0,
    schedule: Schedule = "constant",
    minus: Minus = "vlm",
    store: Storage = "device",
) -> Prior:
    """The prior of two or three folders or hub ids, for `DriftCallback` or `bind_prior`; raises as `make_prior`.

    modules, layers: groups or patterns, and ranges, as in every recipe; a mapping gives each entry its share of the
    strength, and a tensor gets the share of the first entry that selects it.
    """
    rule = PushRule(mode, strength, schedule)
    modules = modules if isinstance(modules, Mapping) else listed(modules)
    base = open_checkpoint(donor_base) if donor_base else None
    alignment = align(open_checkpoint(vlm), open_checkpoint(donor), base, modules=tuple(modules), layers=layers)
    return make_prior(alignment, rule, minus=minus, shares=shares_of(modules), store=store)


def shares_of(modules: Sequence[str] | Mapping[str, float]) -> Mapping[str, float]:
    """The share of the strength of each entry of `modules`; 1 if none is given."""
    return modules if isinstance(modules, Mapping) else dict.fromkeys(modules, 1.0)


def make_prior(
    alignment: Alignment,
    rule: PushRule | None = None,
    *,
    minus: Minus = "vlm",
    shares: Mapping[str, float] = ALIKE,
    store: Storage = "device",
    dtype: torch.dtype = torch.bfloat16,
) -> Prior:
    """The prior of an alignment: Δ = W_donor − W_vlm, or W_donor − W_base, for its merged tensors.

    shares: of the rule's strength, by group or pattern.

    Raises:
        AlignmentError: no base was given, or Δ is zero everywhere.
        WeightsError: NaN or infinity in a checkpoint (names tensor and file).
    """
    if minus == "base" and alignment.donor_base is None:
        raise AlignmentError("donor_base: missing; with delta: base the prior is the donor minus its base")
    return _collect(alignment, partial(_differences, alignment, minus), rule, shares, store, dtype)


def filtered_prior(
    alignment: Alignment,
    factors: FactorStore | Mapping[str, Factors],
    gates: Gates | str | Path,
    rule: PushRule | None = None,
    *,
    shares: Mapping[str, float] = ALIKE,
    store: Storage = "device",
    dtype: torch.dtype = torch.bfloat16,
) -> Prior:
    """A prior along the directions that FRISM's gates leave open (not in the paper): Δ = U diag(σ(g) ⊙ s) Vh.

    It covers the merged tensors that have gates.

    Raises:
        CheckpointError: the gates belong to other factors. AlignmentError: no merged tensor has gates, or all are shut.
    """
    gates = gates if isinstance(gates, Gates) else load_gates(gates)
    check_gates(gates, factors)
    logits = gates.logits

    def derive(tensor: AlignedTensor, _: Tensor) -> Tensor | None:
        if tensor.name not in logits or tensor.name not in factors:
            return None
        factor = factors[tensor.name]
        return factor.update(factor.s * gates.open(tensor.name))

    source = _Source(derive, partial(sources_of_factors, factors), lambda tensor, _: f"{tensor.name} of the factors")
    return _collect(alignment, lambda: nullcontext(source), rule, shares, store, dtype)


def _collect(
    alignment: Alignment,
    opened: Callable[[], AbstractContextManager[_Source]],
    rule: PushRule | None,
    shares: Mapping[str, float],
    store: Storage,
    dtype: torch.dtype,
) -> Prior:
    """Every Δ with its norm, and every tensor's verdict; values of Δ are kept only if a single process trains."""
    _refuse_hidden_shares(alignment, shares)
    alone = rank_and_world()[1] == 1
    deltas: dict[str, Delta] = {}
    verdicts = []
    with opened() as source, Reader(alignment.vlm) as vlm:
        for tensor in alignment.tensors:
            if tensor.verdict != "merged":
                verdicts.append(PushVerdict(tensor.name, tensor.verdict, tensor.reason))
                continue
            weight = vlm.tensor(tensor.name)
            value = source.derive(tensor, weight)
            if value is None:
                verdicts.append(PushVerdict(tensor.name, "kept", "it has no gates: only gated matrices are pushed"))
                continue
            delta = _measured(tensor, value.to(dtype), weight.float(), shares)
            if not math.isfinite(delta.norm + delta.size):
                own = f"{tensor.name} of {alignment.vlm.path}"
                what = source.blame(tensor, weight) if math.isfinite(delta.size) else own
                raise WeightsError(f"{what}: holds NaN or infinity; fetch it again")
            if delta.norm > 0:
                deltas[tensor.name] = delta if alone else replace(delta, value=delta.value.to("meta"))
                verdicts.append(PushVerdict(tensor.name, "pushed", tensor.reason))
            else:
                verdicts.append(PushVerdict(tensor.name, "zero", "the donor's tensor is the same: Δ is zero"))
    if not deltas:
        raise AlignmentError(
            f"{alignment.donor.path}: Δ is zero for every selected tensor, or none has gates: nothing to push towards; "
            "check that donor and vlm (or donor_base) are what you mean, and `modules`"
        )
    sources = {**source.digests(), "vlm": vlm.digests()}
    again = None if alone else partial(_values, alignment, opened, dtype)
    return Prior(rule or PushRule(), deltas, tuple(verdicts), store, sources, again)


@contextmanager
def _values(
    alignment: Alignment, opened: Callable[[], AbstractContextManager[_Source]], dtype: torch.dtype
) -> Iterator[Callable[[str], Tensor]]:
    """Δ by tensor name, computed on request; raises CheckpointError if a file was changed since."""
    tensors = {tensor.name: tensor for tensor in alignment.merged}
    with opened() as source, Reader(alignment.vlm) as vlm:

        def value_of(name: str) -> Tensor:
            value = source.derive(tensors[name], vlm.tensor(name))
            assert value is not None, name
            return value.to(dtype)

        yield value_of


@contextmanager
def _differences(alignment: Alignment, minus: Minus) -> Iterator[_Source]:
    """Inside the context, donor and base are open: W_donor − W_vlm or W_donor − W_base, float32, in the VLM's shape."""
    with ExitStack() as stack:
        keys = ("donor", "donor_base") if minus == "base" else ("donor",)
        readers = {key: stack.enter_context(Reader(getattr(alignment, key))) for key in keys}

        def side(key: str, tensor: AlignedTensor, weight: Tensor) -> Tensor:
            if key == "vlm":
                return weight
            return assemble(getattr(tensor, key), readers[key].tensor, tuple(weight.shape), weight)

        def difference(tensor: AlignedTensor, weight: Tensor) -> Tensor:
            other = "vlm" if minus == "vlm" else "donor_base"
            return side("donor", tensor, weight).float() - side(other, tensor, weight).float()

        def blame(tensor: AlignedTensor, weight: Tensor) -> str:
            for key in keys:
                if not torch.isfinite(side(key, tensor, weight)).all():
                    return f"{', '.join(getattr(tensor, key).names)} of {getattr(alignment, key).path}"
            return f"Δ of {tensor.name}"

        yield _Source(difference, lambda: {key: reader.digests() for key, reader in readers.items()}, blame)


def _refuse_hidden_shares(alignment: Alignment, shares: Mapping[str, float]) -> None:
    """Raise AlignmentError for an entry whose tensors all have another share, by entries that stand before it."""
    for entry in shares:
        firsts = [_first_entry(tensor, shares) for tensor in alignment.merged if _selected(entry, tensor)]
        theirs = {first for first in firsts if first is not None}
        if theirs and entry not in theirs and any(shares[first] != shares[entry] for first in theirs):
            before = ", ".join(sorted(theirs))
            raise AlignmentError(
                f"modules: {entry} has no effect: {before} stands before it and selects its tensors; write it first"
            )


def _selected(entry: str, tensor: AlignedTensor) -> bool:
    return selects(entry, tensor.name, tensor.role or tensor.name, tensor.group)


def _first_entry(tensor: AlignedTensor, shares: Mapping[str, float]) -> str | None:
    return next((entry for entry in shares if _selected(entry, tensor)), None)


def _measured(tensor: AlignedTensor, value: Tensor, weight: Tensor, shares: Mapping[str, float]) -> Delta:
    role = tensor.role or tensor.name
    entry = _first_entry(tensor, shares)
    share = 1.0 if entry is None else shares[entry]
    norm = float(torch.linalg.vector_norm(value, dtype=torch.float64))
    start = float((weight * value.float()).sum(dtype=torch.float64))
    size = float(torch.linalg.vector_norm(weight, dtype=torch.float64))
    return Delta(tensor.name, role, tensor.group, value, norm, start, size, share)
