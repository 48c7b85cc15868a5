"""A recipe's models and questions, loaded and ready to learn gates: donors answer first, then the VLM is loaded."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch

from vlmgraft.distillation.distill import Distiller
from vlmgraft.distillation.distributed import group_of_one
from vlmgraft.distillation.fits import offloads
from vlmgraft.distillation.servers import donor_endpoints, vlm_endpoint
from vlmgraft.distillation.sharding import shard
from vlmgraft.distillation.targets import DONOR_BATCH, Targets, join_targets
from vlmgraft.distillation.teacher import TeacherOutputs, teacher_outputs
from vlmgraft.hf.models import empty_vlm, load_processor, load_text_model, load_vlm
from vlmgraft.hf.placement import default_device, learning_dtype
from vlmgraft.hf.sharded import text_shards, vlm_shards
from vlmgraft.methods.calibration import BATCHES
from vlmgraft.methods.curvature import Curvature
from vlmgraft.methods.frism import Frism, GatedMethod
from vlmgraft.recipe.resolve import Job
from vlmgraft.spectral.factor_store import Store
from vlmgraft.storage.progress import Progress
from vlmgraft.storage.torchrun import agreed, process

READ_ALIKE = ("max_new_tokens", *BATCHES, "packing", "tokens")
"""Fields that `Calibration` and `Distiller` share."""


def reading_of(method: GatedMethod) -> dict[str, Any]:
    """The fields of `Distiller` that a recipe sets."""
    return {name: getattr(method.calibration, name) for name in READ_ALIKE} | {"seed": method.seed}


@contextmanager
def distiller_for(
    job: Job, store: Store, out: Path, progress: Progress | None
) -> Iterator[tuple[Distiller, Targets | None]]:
    """Inside the context, a distiller with the recipe's models and questions, and donors' targets for donor matching.

    Donors answer before the VLM is loaded: no two models are in memory at once.
    """
    method = job.method
    learned, held_out, _, _ = job.required_questions
    device = default_device()
    tensors = job.vlm.tensors.values()
    dtype = learning_dtype(device, sum(info.elements for info in tensors), {info.dtype for info in tensors})
    offload = agreed(partial(offloads, method, job.vlm.path, [*learned, *held_out], device, dtype))
    placed: dict[str, Any] = {"dtype": dtype, "device": device}
    cache = out.with_name(out.name + ".teacher")
    with group_of_one(offload, device):
        outputs = _donor_outputs(job, placed, offload, cache, progress)
        distiller = Distiller(
            _loaded(load_vlm, vlm_shards, job.vlm.path, **placed, offload=offload),
            load_processor(job.vlm.path),
            store,
            learned,
            held_out,
            progress=progress,
            cache=cache,
            keep_factors=process()[1] == 1 and (isinstance(method, Curvature) or method.start == "curvature"),
            offload=offload,
            endpoint=vlm_endpoint(job.recipe, method, job.vlm.path),
            **reading_of(method),
        )
        yield distiller, join_targets([distiller.targets_from(one) for one in outputs]) if outputs else None


def _loaded(
    whole: Callable[..., Any],
    in_shards: Callable[..., Any],
    path: Path,
    dtype: torch.dtype,
    device: torch.device,
    offload: bool,
) -> Any:
    """Load a model whole or sharded. Several processes read shards; a single one with offloading loads to the CPU."""
    alone = process()[1] == 1
    if alone and not offload:
        return whole(path, dtype, device)
    model = whole(path, dtype, "cpu") if alone else in_shards(path, dtype, device)
    return shard(model, device, offload=offload)


def _donor_outputs(
    job: Job, placed: Mapping[str, Any], offload: bool, cache: Path, progress: Progress | None
) -> list[TeacherOutputs]:
    """The donors' outputs on their questions, with one donor loaded at a time; empty without donor matching."""
    method, outputs = job.method, list[TeacherOutputs]()
    if not isinstance(method, Frism) or method.inject != "donor":
        return outputs
    student = empty_vlm(job.vlm.path), load_processor(job.vlm.path)
    options = {**reading_of(method), "max_new_tokens": method.donor_length, "batch_size": DONOR_BATCH}
    options |= {"cache": cache, "progress": progress}
    endpoints = donor_endpoints(job.recipe, method, [alignment.donor.path for alignment in job.alignments])
    for alignment, questions, endpoint in zip(job.alignments, job.required_questions.donors, endpoints, strict=True):
        path = alignment.donor.path
        here = offload and not alignment.donor.packed  # a quantised donor is small, and its tensors are of other types
        donor = _loaded(load_text_model, text_shards, path, **placed, offload=here)
        teacher = (donor, load_processor(path))
        outputs.append(teacher_outputs(teacher, questions, student, endpoint=endpoint, **options))
        del donor, teacher
        gc.collect()  # its modules and their hooks refer to each other
    return outputs
