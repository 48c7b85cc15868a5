"""Δ of DRIFT's prior, streamed from checkpoint folders: donor − VLM, donor − base, or a task vector behind gates.

One tensor of each checkpoint is in memory at a time; what stays is Δ itself, in bfloat16 unless asked otherwise.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from vlmgraft.alignment import AlignedTensor, Alignment, align, assemble
from vlmgraft.checkpoint.index import open_checkpoint
from vlmgraft.checkpoint.reader import Reader
from vlmgraft.errors import AlignmentError, WeightsError
from vlmgraft.spectral.factors import Factors, FactorStore
from vlmgraft.spectral.gates import Gates, load_gates
from vlmgraft.training.prior import Mode, PushRule, Schedule

Minus = Literal["vlm", "base"]
Store = Literal["device", "cpu"]


@dataclass(frozen=True)
class Verdict:
    """What the prior does with one tensor of the VLM: pushed, zero (Δ vanishes), excluded or kept, and why."""

    name: str
    verdict: Literal["pushed", "zero", "excluded", "kept"]
    reason: str


@dataclass(frozen=True)
class Delta:
    """Δ of one tensor, on the CPU. name: the VLM's, on disk. role: inside the text model.

    norm: ‖Δ‖ as stored. start: ⟨W_vlm, Δ⟩, from which the way to the donor is measured. size: ‖W_vlm‖.
    """

    name: str
    role: str
    group: str
    value: Tensor
    norm: float
    start: float
    size: float


@dataclass(frozen=True)
class Prior:
    """A rule, the Δ it pushes along (by VLM tensor name), and a verdict for every tensor of the VLM.

    store: where Δ lies while training. `device` takes its size (2 bytes an element) of the accelerator's memory, `cpu`
    keeps it in pinned memory and copies it over at every step.
    """

    rule: PushRule
    deltas: Mapping[str, Delta]
    verdicts: tuple[Verdict, ...]
    store: Store = "device"


def load_prior(
    vlm: str | Path,
    donor: str | Path,
    donor_base: str | Path | None = None,
    *,
    modules: Sequence[str] = ("attention",),
    layers: str | int | Sequence[int] = "all",
    mode: Mode = "adaptive",
    strength: float = 1.0,
    schedule: Schedule = "constant",
    minus: Minus = "vlm",
    store: Store = "device",
) -> Prior:
    """The prior of two or three folders or hub ids, for `DriftCallback` or `bind_prior`; raises as `make_prior`.

    modules, layers: groups or patterns, and ranges, as in every recipe.
    """
    rule = PushRule(mode, strength, schedule)
    base = open_checkpoint(donor_base) if donor_base else None
    alignment = align(open_checkpoint(vlm), open_checkpoint(donor), base, modules=modules, layers=layers)
    return make_prior(alignment, rule, minus=minus, store=store)


def make_prior(
    alignment: Alignment,
    rule: PushRule | None = None,
    *,
    minus: Minus = "vlm",
    store: Store = "device",
    dtype: torch.dtype = torch.bfloat16,
) -> Prior:
    """The prior of an alignment: Δ = W_donor − W_vlm, or W_donor − W_base, for its merged tensors.

    Raises:
        AlignmentError: no base was given, or Δ is zero everywhere.
        WeightsError: NaN or infinity in a checkpoint (names tensor and file).
    """
    if minus == "base" and alignment.donor_base is None:
        raise AlignmentError("donor_base: missing; with delta: base the prior is the donor minus its base")
    with ExitStack() as stack:
        keys = ("donor", "donor_base") if minus == "base" else ("donor",)
        readers = {key: stack.enter_context(Reader(getattr(alignment, key))) for key in keys}

        def load(tensor: AlignedTensor, own: Tensor) -> Tensor:
            return _difference(alignment, tensor, own, readers, minus)

        return _collect(alignment, load, rule, store, dtype)


def filtered_prior(
    alignment: Alignment,
    factors: FactorStore | Mapping[str, Factors],
    gates: Gates | str | Path,
    rule: PushRule | None = None,
    *,
    store: Store = "device",
    dtype: torch.dtype = torch.bfloat16,
) -> Prior:
    """A prior along what FRISM's gates leave open (ours): Δ = U diag(σ(g) ⊙ s) Vh, for the merged tensors with gates.

    Raises:
        CheckpointError: the gates belong to other factors. AlignmentError: no merged tensor has gates, or all are shut.
    """
    gates = gates if isinstance(gates, Gates) else load_gates(gates)
    gates.check(factors)
    logits = gates.logits

    def load(tensor: AlignedTensor, _: Tensor) -> Tensor | None:
        if tensor.name not in logits or tensor.name not in factors:
            return None
        factor = factors[tensor.name]
        return factor.update(factor.s * gates.open(tensor.name))

    return _collect(alignment, load, rule, store, dtype)


def _collect(
    alignment: Alignment,
    load: Callable[[AlignedTensor, Tensor], Tensor | None],
    rule: PushRule | None,
    store: Store,
    dtype: torch.dtype,
) -> Prior:
    """Every Δ with its norm, and every tensor's verdict. load: Δ from the tensor and the VLM's own values."""
    deltas: dict[str, Delta] = {}
    verdicts = []
    with Reader(alignment.vlm) as vlm:
        for tensor in alignment.tensors:
            if tensor.verdict != "merged":
                verdicts.append(Verdict(tensor.name, tensor.verdict, tensor.reason))
                continue
            own = vlm.tensor(tensor.name)
            value = load(tensor, own)
            if value is None:
                verdicts.append(Verdict(tensor.name, "kept", "it has no gates: only gated matrices are pushed"))
                continue
            delta = _measured(tensor, value.to(dtype), own.float())
            if delta.norm > 0:
                deltas[tensor.name] = delta
                verdicts.append(Verdict(tensor.name, "pushed", tensor.reason))
            else:
                verdicts.append(Verdict(tensor.name, "zero", "the donor's tensor is the same: Δ is zero"))
    if not deltas:
        raise AlignmentError(
            f"{alignment.donor.path}: Δ is zero for every selected tensor, or none has gates: nothing to push towards; "
            "check that donor and vlm (or donor_base) are what you mean, and `modules`"
        )
    return Prior(rule or PushRule(), deltas, tuple(verdicts), store)


def _measured(tensor: AlignedTensor, value: Tensor, own: Tensor) -> Delta:
    norm = float(torch.linalg.vector_norm(value, dtype=torch.float64))
    start = float((own * value.float()).sum(dtype=torch.float64))
    size = float(torch.linalg.vector_norm(own, dtype=torch.float64))
    return Delta(tensor.name, tensor.role or tensor.name, tensor.group, value, norm, start, size)


def _difference(
    alignment: Alignment, tensor: AlignedTensor, own: Tensor, readers: Mapping[str, Reader], minus: Minus
) -> Tensor:
    """W_donor − W_vlm or W_donor − W_base in float32, in the VLM's shape."""
    sides: list[Tensor] = []
    for key in ("donor", "vlm" if minus == "vlm" else "donor_base"):
        source: Any = getattr(tensor, key, None)
        side = own if key == "vlm" else assemble(source, readers[key].tensor, tuple(own.shape), own)
        if not torch.isfinite(side).all():
            names = tensor.name if key == "vlm" else ", ".join(source.names)
            raise WeightsError(f"{names} of {getattr(alignment, key).path}: holds NaN or infinity; fetch it again")
        sides.append(side.float())
    return sides[0] - sides[1]
