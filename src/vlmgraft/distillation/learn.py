"""From a recipe to gates: read the questions, load the models, learn the gates and save them to a folder.

Under `torchrun` or `accelerate launch` every process runs the same calls: it reads its shards of the models, the
teacher's batches are divided, factors are sharded too, and the first process writes the gates.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import asdict, fields, replace
from functools import partial
from pathlib import Path
from typing import Any

from vlmgraft.checkpoint.reader import Reader
from vlmgraft.distillation.curvature import FisherDiagonal, curvature_gates, curvature_start, estimate_curvature
from vlmgraft.distillation.distill import Distiller
from vlmgraft.distillation.distributed import join_group
from vlmgraft.distillation.fits import Kept, checkpoints
from vlmgraft.distillation.guarantee import check_guarantee, within_budget
from vlmgraft.distillation.targets import Targets
from vlmgraft.distillation.trainer import Training
from vlmgraft.errors import OutputError, RecipeError, WeightsError
from vlmgraft.hf.batches import check_lengths
from vlmgraft.hf.models import empty_vlm, load_config, load_processor
from vlmgraft.hf.modules import match_projections
from vlmgraft.hf.placement import default_device, learning_dtype
from vlmgraft.hf.sharded import check_sharding
from vlmgraft.merging.pieces import squared_norm
from vlmgraft.methods.curvature import Curvature
from vlmgraft.methods.frism import Frism, GatedMethod
from vlmgraft.recipe.resolve import Job
from vlmgraft.spectral.decompose import check_store, decompose
from vlmgraft.spectral.factor_store import FactorStore, Store, donor_folder, open_store
from vlmgraft.spectral.gate_store import load_gates, save_gates
from vlmgraft.spectral.gates import Gates
from vlmgraft.spectral.task_vector import checkpoint_digest, file_stamp
from vlmgraft.spectral.threads import threads_for
from vlmgraft.storage.files import make_folder, sweep_files
from vlmgraft.storage.progress import Progress
from vlmgraft.storage.publish import sweep_folders
from vlmgraft.storage.torchrun import agreed, barrier, check_same, process, rank_and_world


def check_inputs(job: Job, gates: Path) -> None:
    """Checks before hours of work: prompts and images fit the models' contexts, the data kept of them fits memory and
    disk, servers are up, and the VLM's weights are finite.

    Donor and base are checked during decomposition. If `gates` already holds what the job would learn, the VLM is not
    read here: the fold checks it. Raises InputError, DataError, RecipeError, WeightsError.
    """
    lengths = check_questions(job)
    if kept_gates(job, gates) is None:
        check_kept(job, lengths, gates.with_name(gates.name + ".teacher"))
        if not gates.with_name(gates.name + ".teacher").is_dir():  # if it exists, answers may be cached
            from vlmgraft.distillation.servers import check_servers

            donors = [alignment.donor.path for alignment in job.alignments]
            check_servers(job.recipe, job.method, job.vlm.path, donors)
        with Reader(job.vlm) as reader:
            for tensor in job.alignment.merged:
                if math.isnan(squared_norm(reader.tensor(tensor.name).float().reshape(-1))):
                    file = job.vlm.tensors[tensor.name].file
                    raise WeightsError(f"{tensor.name} in {file} (vlm): holds NaN or infinity")


def check_kept(job: Job, lengths: Sequence[int], folder: Path) -> None:
    """Raise RecipeError if the data kept of such prompts does not fit into memory, or on the disk of `folder`."""
    tensors = job.vlm.tensors.values()
    dtype = learning_dtype(default_device(), sum(info.elements for info in tensors), {info.dtype for info in tensors})
    Kept.of(load_config(job.vlm.path), job.method.calibration, lengths, dtype.itemsize).check(folder)


def check_questions(job: Job) -> list[int]:
    """The part of `check_inputs` that reads no weights: modules can be gated, and questions fit. Returns the lengths of
    the prompts that the VLM answers."""
    if job.vlm.packed:
        raise RecipeError(
            f"vlm {job.vlm.path}: its weights are quantised, and gates are learned in 16 bits: merge it once by "
            "task_arithmetic with scale: 0, and give that folder"
        )
    match_projections(empty_vlm(job.vlm.path), [tensor.name for tensor in job.alignment.merged])
    learned, held_out, donors, unseen = job.required_questions
    if rank_and_world()[1] > 1:
        answering = [alignment.donor for alignment, questions in zip(job.alignments, donors, strict=False) if questions]
        check_sharding(default_device(), *answering)
    if isinstance(job.method, Frism):
        check_guarantee(job.method)
    longest = job.method.calibration.max_new_tokens
    config, processor = load_config(job.vlm.path), load_processor(job.vlm.path)
    lengths = check_lengths(config, processor, [*learned, *held_out, *unseen], longest)
    longest = job.method.donor_length
    for alignment, questions in zip(job.alignments, donors, strict=False):
        if questions:
            check_lengths(config, processor, questions, longest)
            path = alignment.donor.path
            check_lengths(load_config(path), load_processor(path), questions, longest)
    return lengths


def factors_for(job: Job, out: Path, *, resume: bool, progress: Progress | None) -> Store:
    """Factors of every donor under `out`, as `decompose` makes them; on a GPU, with the copies that training reads."""
    make_folder(out.parent)
    device = default_device()
    options: dict[str, Any] = {"resume": resume, "train_copy": device.type == "cuda", "device": device}
    join_group()
    for number, alignment in enumerate(job.alignments):
        decompose(alignment, donor_folder(out, number), job.method.rank, progress=progress, **options)
    store = open_store(out)
    check_same("the factors", store.digest)
    return store


def check_factors(job: Job, folder: Path) -> None:
    """Raise CheckpointError unless the folder holds the factors of this recipe, of every donor."""
    for number, alignment in enumerate(job.alignments):
        check_store(alignment, FactorStore(donor_folder(folder, number)), job.method.rank)


def gates_for(job: Job, store: Store, out: Path, progress: Progress | None, *, replace_others: bool = True) -> Gates:
    """The gates in `out` if they belong to this job and these factors; else gates learned now and saved there.

    Beside `out`, `out.teacher` caches the teacher's answers and log-probabilities, a batch at a time, and `out.state`
    holds the training state, saved every few steps; an interrupted run resumes from both. replace_others: gates of
    another recipe are replaced; otherwise they raise OutputError.
    """
    join_group()
    rank = process()[0]
    check_same("the factors", store.digest)
    kept = agreed(lambda: kept_gates(job, out))
    if kept is not None and kept.factors == store.digest:
        if rank == 0:
            _drop_state(out)  # left by a run that was killed after saving the gates
        return kept
    if not replace_others and agreed((out / "gates.json").is_file):
        raise OutputError(f"{out}: holds gates of another recipe; name another folder, or remove it first")
    made_from = learned_from(job)
    barrier()
    with threads_for(sum(info.elements for info in job.vlm.tensors.values())):
        learned = _learn(job, store, out, progress if rank == 0 else None)
    gates = replace(learned, settings={**learned.settings, "from": made_from}, factors=store.digest)
    if rank == 0:
        save_gates(gates, out)
        _drop_state(out)
    barrier()
    return gates


def kept_gates(job: Job, out: Path, **more: Any) -> Gates | None:
    """The gates in `out` if they were learned from this job's inputs (and `more`), with any factors.

    The VLM counts as unchanged if the stamp of its files is (`file_stamp`); otherwise its content is compared.
    """
    if not (out / "gates.json").is_file():
        return None
    gates = load_gates(out)
    recorded = gates.settings.get("from")
    if not isinstance(recorded, dict):
        return None
    known = {key: value for key, value in recorded.items() if key not in ("vlm", "vlm_stamp")}
    if known != {**_named_by(job), **more}:
        return None
    stamp = file_stamp(job.vlm)
    same = (bool(stamp) and recorded.get("vlm_stamp") == stamp) or recorded.get("vlm") == checkpoint_digest(job.vlm)
    return gates if same else None


def _drop_state(out: Path) -> None:
    """Remove the state of a finished training, and leftovers of killed runs."""
    state = out.with_name(out.name + ".state")
    state.unlink(missing_ok=True)
    sweep_files(state.parent, state.name)
    sweep_folders(out, finished=True)


def learned_from(job: Job) -> dict[str, Any]:
    """The inputs that gates must have been learned from to be reused, as JSON values."""
    stamp = file_stamp(job.vlm)  # before the content, so that a change in between is noticed
    return {**_named_by(job), "vlm": checkpoint_digest(job.vlm), "vlm_stamp": stamp}


def _named_by(job: Job) -> dict[str, Any]:
    """The part of `learned_from` that reads no checkpoint; a digest, because it contains paths of this machine."""
    method: dict[str, Any] = asdict(job.method)
    for option in ("gradient_checkpointing", "offload", "donor_endpoint"):
        method.pop(option, None)  # they decide where work is done: the gates are the same
    for option in ("columns", "endpoint"):
        method["calibration"].pop(option)
    donors = [[str(pair.donor.path), str(pair.donor_base.path if pair.donor_base else None)] for pair in job.alignments]
    named = {"recipe": method, "donors": donors, "questions": list(job.digests)}
    return {"job": hashlib.sha256(json.dumps(named, sort_keys=True, default=str).encode()).hexdigest()}


def _learn(job: Job, store: Store, out: Path, progress: Progress | None) -> Gates:
    from vlmgraft.distillation.loading import distiller_for

    method = job.method
    with distiller_for(job, store, out, progress) as (distiller, donor):
        state = out.with_name(out.name + ".state")
        started = agreed(state.is_file)
        unseen = job.required_questions.unseen
        prompts = distiller.teacher_targets(unseen) if unseen else None
        learned = learned_gates(distiller, method, donor, started=started, state=state)
        if (held_out := distiller.held_out_targets) is not None and not _measured(learned, held_out):
            with distiller.applied(learned) as model:
                lower, upper = held_out.mean_bounds(model)
            bounds = {"held_out_kl": lower} | ({} if held_out.whole else {"held_out_kl_upper": upper})
            learned = replace(learned, settings={**bounds, **learned.settings})
        if prompts is None or not isinstance(method, Frism):
            return learned
        return within_budget(method, distiller, learned, prompts)


def _measured(gates: Gates, held_out: Targets) -> bool:
    return "held_out_kl" in gates.settings and (held_out.whole or "held_out_kl_upper" in gates.settings)


def learned_gates(
    distiller: Distiller,
    method: GatedMethod,
    donor: Targets | None = None,
    *,
    curvature: FisherDiagonal | None = None,
    started: bool = False,
    state: Path | None = None,
) -> Gates:
    """The gates of a recipe's method: in the order of the curvature, or trained.

    curvature: the result of `estimate_curvature` for this method's draws and seed, if known. state: the file of
    `Distiller.learn`; started: training resumes from it.
    """
    estimate = partial(estimate_curvature, distiller, seed=method.seed)
    if isinstance(method, Curvature):
        curvature = curvature or estimate(draws=method.draws, checkpointing=checkpoints(method, distiller))
        return curvature_gates(distiller, method.scale, method.kl_budget, curvature=curvature)
    start: Gates | float = 0.0
    if method.start == "curvature" and method.kl_budget is not None and not started:
        curvature = estimate(checkpointing=checkpoints(method, distiller))
        start = curvature_start(distiller, method.scale, method.kl_budget, curvature=curvature)
    return distiller.learn(method.scale, donor=donor, state=state, start=start, **training_of(method, distiller))


def training_of(method: GatedMethod, distiller: Distiller) -> dict[str, Any]:
    """The fields of `Training` that a recipe sets, except the scale."""
    names = ({field.name for field in fields(Training)} & {field.name for field in fields(method)}) - {"scale"}
    settings = {name: getattr(method, name) for name in names}
    return settings | {"gradient_checkpointing": checkpoints(method, distiller)}
