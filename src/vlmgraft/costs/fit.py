"""How gate training fits a device's memory: in which of the recipe's ways, or what to lower if it does not fit."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial

from vlmgraft.costs.cost import Work, training_memory
from vlmgraft.costs.device import Device
from vlmgraft.costs.models import Model
from vlmgraft.distillation.fits import ROOM, WAYS, Way, ways_of
from vlmgraft.distillation.memory import Memory, host_memory_of
from vlmgraft.methods.frism import GatedMethod


@dataclass(frozen=True)
class Fit:
    """How gate training fits a device's memory. note: the same in words, with a remedy if it does not fit. host: bytes
    of offloaded layers in host memory."""

    fits: bool
    checkpointing: bool
    offload: bool
    needed: float
    host: int
    note: str


def fitting(model: Model, work: Work, device: Device, method: GatedMethod) -> Fit:
    """The first way allowed by the recipe (`ways_of`) in which training fits; if there is none, what to set or lower,
    in this order: the recipe's ways, questions in a batch, directions per matrix."""

    def memory(work: Work, way: Way) -> Memory:
        return training_memory(model, replace(work, checkpointing=way[0], offload=way[1]), width=device.width)

    def needed(work: Work, way: Way) -> float:
        return memory(work, way).total

    room, ways = ROOM * device.memory, ways_of(method, device.is_gpu)
    chosen = next((way for way in ways if needed(work, way) <= room), ways[-1])
    host = host_memory_of(model.shapes, rank=work.rank, gpus=work.gpus, width=device.width) if chosen[1] else 0
    held = memory(work, chosen)
    sizes = f"{held.total / 2**30:.1f} GiB ({held}) of {device.memory / 2**30:.1f} on {device.name}"
    result = partial(Fit, checkpointing=chosen[0], offload=chosen[1], needed=needed(work, chosen), host=host)
    if needed(work, chosen) <= room:
        how = "with checkpointed layers" if chosen[0] else "without checkpointing"
        if chosen[1]:
            whole = needed(work, (chosen[0], False)) / 2**30
            why = "as the recipe says" if method.offload is True else f"else {whole:.1f} GiB, over nine tenths of it"
            how += f", offloaded ({why}): {host / 2**30:.1f} GiB of host memory"
        return result(fits=True, note=f"gates take {sizes}, {how}")
    lowest = (True, device.is_gpu)
    lower = [(work, way) for way in WAYS if way[1] <= lowest[1]]
    batches = [2**power for power in range(work.batch.bit_length()) if 2**power < work.batch][::-1]
    lower += [(replace(work, batch=batch), lowest) for batch in batches]
    lower += [(replace(work, batch=1, rank=rank), lowest) for rank in (256, 128, 64, 32, 16)
              if work.rank == "full" or rank < work.rank]  # fmt: skip
    smaller, way = next((one for one in lower if needed(*one) <= room), (None, lowest))
    advice = "no batch or rank fits: use more GPUs (torchrun), or a larger one"
    if smaller is not None:
        changed = {
            "gradient_checkpointing: true": way[0] and not any(first for first, _ in ways),
            "offload: true": way[1] and not any(second for _, second in ways),
            f"calibration.batch_size: {smaller.batch}": smaller.batch != work.batch,
            f"rank: {smaller.rank}": smaller.rank != work.rank,
        }
        advice = "set " + ", ".join(f"method.{option}" for option, differs in changed.items() if differs)
    return result(fits=False, note=f"gates would take {sizes}, too much: {advice}")
