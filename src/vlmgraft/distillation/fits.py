"""How gate training fits into device memory, and whether the data kept of its questions fits host memory and disk."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from vlmgraft.distillation.memory import Shapes, memory_of
from vlmgraft.distillation.targets import FULL_VOCABULARY, TOP_K
from vlmgraft.errors import RecipeError
from vlmgraft.hf.batches import Question, prompt_lengths
from vlmgraft.hf.models import load_config, load_processor
from vlmgraft.methods.calibration import Calibration
from vlmgraft.methods.frism import GatedMethod
from vlmgraft.storage.outputs import disk_of
from vlmgraft.storage.resources import free_memory
from vlmgraft.storage.torchrun import agreed, process

if TYPE_CHECKING:
    from vlmgraft.distillation.distill import Distiller

ROOM = 0.9
"""Usable share of a device's memory; the rest is for the allocator's slack, CUDA's own memory, and communication."""
Way = tuple[bool, bool]
"""How training is made to fit: (layers are checkpointed, layers are offloaded)."""
WAYS: tuple[Way, ...] = ((False, False), (True, False), (False, True), (True, True))
"""The fastest first."""


def ways_of(method: GatedMethod, on_gpu: bool) -> list[Way]:
    """The ways that a recipe allows; with "auto", offloading only on a GPU."""
    first, second = method.gradient_checkpointing, method.offload if on_gpu else method.offload is True
    return [way for way in WAYS if first in ("auto", way[0]) and second in ("auto", way[1])]


def way_that_fits(ways: Iterable[Way], shapes: Shapes, memory: float, **work: Any) -> Way | None:
    """The first way in which a training step fits into `memory` bytes; `work` as `memory_of` takes it."""
    for way in ways:
        if memory_of(shapes, checkpointing=way[0], offload=way[1], **work).total <= ROOM * memory:
            return way
    return None


def largest_batch(calibration: Calibration, questions: int, longest: int) -> int:
    """The most questions in a training batch, of `questions` in all, if the longest prompt has `longest` tokens."""
    fitting = calibration.batch_tokens // (longest + calibration.max_new_tokens)
    return max(1, min(calibration.batch_size, calibration.samples, questions, fitting))


@dataclass(frozen=True)
class Kept:
    """Bytes that training keeps of its questions. `disk`: image features and the teacher's distributions. `host`: the
    distributions and the text model's inputs, in this machine's memory."""

    disk: int
    host: int

    @classmethod
    def of(cls, config: Any, calibration: Calibration, lengths: Sequence[int], width: int) -> Kept:
        """Upper bound: prompts of `lengths` tokens, all image tokens, and answers of full length; without padding."""
        text = config.get_text_config(decoder=True)
        deeper = getattr(getattr(config, "vision_config", None), "deepstack_visual_indexes", None) or ()
        row = width * text.hidden_size * (1 + len(deeper))
        answered = len(lengths) * calibration.max_new_tokens
        counting = answered + (sum(lengths) if calibration.tokens == "all" else 0)
        targets = counting * (4 * text.vocab_size if text.vocab_size <= FULL_VOCABULARY else 4 * (2 * TOP_K + 1))
        features = 0 if calibration.endpoint else row * sum(lengths)
        return cls(features + targets, targets + row * (sum(lengths) + answered))

    def check(self, folder: Path | None) -> str:
        """Kept and free bytes, in words. Raises RecipeError if the kept data does not fit into memory, or on the disk
        of `folder`, not counting files that the folder already holds."""
        fewer = "lower method.calibration.max_pixels, samples or held_out"
        free = free_memory()
        if self.host > free:
            raise RecipeError(
                f"what the text model reads of all questions takes {_gb(self.host)} of this machine's memory, "
                f"{_gb(free)} are free: {fewer}"
            )
        note = f"the text model's inputs take {_gb(self.host)} of host memory ({_gb(free)} free), pixels none; "
        note += f"image features and answers take {_gb(self.disk)} of disk"
        if folder is None:
            return note
        there = sum(file.stat().st_size for file in folder.rglob("*.safetensors"))
        disk, room = disk_of(folder)
        if self.disk - there > room:
            raise RecipeError(
                f"{folder}: image features and answers take {_gb(self.disk)}, its disk has {_gb(room)} free: {fewer}, "
                "make room, or choose a folder on another disk"
            )
        return f"{note} ({_gb(room)} free in {disk})"


def _gb(size: int) -> str:
    return f"{size / 1e9:.2f} GB"


def offloads(
    method: GatedMethod, path: Path, questions: Sequence[Question], device: torch.device, dtype: torch.dtype
) -> bool:
    """Whether layers are offloaded to host memory: as the recipe says, or (auto) on a GPU if a training step with the
    longest of `questions` would not fit otherwise. Reads the VLM's config and processor."""
    ways = ways_of(method, device.type == "cuda")
    if len({offload for _, offload in ways}) == 1:
        return ways[0][1]
    calibration, config = method.calibration, load_config(path)
    longest = max(prompt_lengths(load_processor(path), questions))
    batch = largest_batch(calibration, len(questions), longest)
    way = way_that_fits(
        ways,
        Shapes.of(config),
        torch.cuda.get_device_properties(device).total_memory,
        rank=method.rank if isinstance(method.rank, int) else "full",
        tokens=batch * (longest + calibration.max_new_tokens),
        answer_tokens=batch * calibration.max_new_tokens,
        gpus=process()[1],
        width=dtype.itemsize,
    )
    return (way or ways[-1])[1]


def checkpoints(method: GatedMethod, distiller: Distiller) -> bool:
    """Whether to checkpoint layers: as the recipe says, or (auto) if the largest batch would not fit without it."""
    if method.gradient_checkpointing != "auto":
        return method.gradient_checkpointing
    device, batches = distiller.model.device, distiller.targets.batches
    cuda = device.type == "cuda"
    memory = torch.cuda.get_device_properties(device).total_memory if cuda else free_memory()
    fits = partial(
        way_that_fits,
        [(False, distiller.offload)],
        Shapes.of(distiller.model.config),
        memory,
        rank=method.rank if isinstance(method.rank, int) else "full",
        tokens=max(batch.tokens() for batch in batches),
        answer_tokens=max(int(batch.predicts.sum()) for batch in batches),
        gpus=process()[1],
        width=distiller.model.dtype.itemsize,
    )
    return agreed(fits) is None
