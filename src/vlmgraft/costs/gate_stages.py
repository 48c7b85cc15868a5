"""The stages of a merge with gates: questions and the processor are read and checked, the rest is predicted."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlmgraft.alignment import Alignment
from vlmgraft.checkpoint.hub import fetch, is_hub_id
from vlmgraft.data.questions import Question
from vlmgraft.errors import InputError
from vlmgraft.methods.frism import Frism, GatedMethod
from vlmgraft.recipe.model import Recipe
from vlmgraft.recipe.resolve import calibration_questions, text_questions
from vlmgraft.storage.resources import free_memory

if TYPE_CHECKING:
    from vlmgraft.costs.cost import Stage, Work
    from vlmgraft.costs.device import Device

ASSUMED_TEXT = 100
"""Tokens assumed for a text question that cannot be read."""
ASSUMED_PROMPT = 1000
"""Tokens assumed for a question that cannot be read, as `costs` does."""


@dataclass(frozen=True)
class StageCost:
    """One stage. seconds: predicted; gpu_memory, host_memory: peak bytes; disk: bytes written; done: what exists
    already, in words."""

    name: str
    seconds: float
    gpu_memory: int
    host_memory: int
    disk: int
    done: str = ""


@dataclass
class Faults:
    """Collects the errors of independent checks, and reports each as it is found."""

    tell: Callable[[str], object]
    texts: list[str] = field(default_factory=list)

    def add(self, text: str) -> None:
        self.texts.append(text)
        self.tell(text)

    @contextmanager
    def collected(self) -> Iterator[None]:
        try:
            yield
        except InputError as error:
            self.add(str(error))


def gated_stages(
    recipe: Recipe, method: GatedMethod, alignment: Alignment, work: Path | None, faults: Faults
) -> tuple[list[StageCost], str, list[str]]:
    """The stages of a merge with gates, the device and notes; questions, processor and device are checked first."""
    from vlmgraft.costs.cost import stages
    from vlmgraft.costs.fit import fitting
    from vlmgraft.costs.models import Model
    from vlmgraft.costs.sample import longest_answer
    from vlmgraft.distillation.fits import Kept
    from vlmgraft.distillation.memory import host_memory_of
    from vlmgraft.hf.models import load_config

    folder = fetch(recipe.vlm, headers_only=True) if is_hub_id(recipe.vlm) else Path(recipe.vlm)
    read = _read(recipe, method, alignment, folder, faults)
    device, place = _device(alignment, faults)
    config, notes = load_config(folder), list(read.notes)
    model, load = Model.of(recipe.vlm, config), _load(method, read.lengths, len(read.text), read.text_prompt)
    fit = fitting(model, load, device, method)
    load = replace(load, checkpointing=fit.checkpointing, offload=fit.offload)
    usual = replace(load, prompt=sum(read.lengths) // len(read.lengths))
    if not fit.fits and device.is_gpu:
        faults.add(fit.note)
    if fit.host > free_memory():
        faults.add(f"offloaded layers take {fit.host / 2**30:.1f} GiB of host memory, {free_memory() / 2**30:.1f} are "
                   "free: lower method.rank, or use more GPUs (torchrun) with method.offload: false")  # fmt: skip
    notes += [fit.note]
    with faults.collected():
        kept = Kept.of(config, method.calibration, read.lengths, device.width)
        notes += [kept.check(work and work / "gates.teacher")]
    with faults.collected():
        notes += _held(alignment, method.rank)
    with faults.collected():
        if not (load.served or faults.texts):
            sampled = read.questions, usual.prompt, load.answer
            if longest := longest_answer(model, folder, *sampled, device, place):
                usual = replace(usual, answer=longest)
                notes += [f"answers are reckoned at {longest} tokens, the longest of a few"]
    both = zip(stages(model, usual, device), stages(model, load, device), strict=True)
    reckoned = {stage.name: replace(stage, memory=most.memory) for stage, most in both}
    done = _done(work, len([tensor for tensor in alignment.merged if tensor.group in ("attention", "mlp")]))
    named = (("decompose", "decompose"), ("answer", "teacher"), ("learn", "gates"), ("fold", "fold"))
    host = {
        "teacher": host_memory_of(model.shapes, rank=0, width=device.width) if fit.offload else 0,
        "gates": fit.host,
    }
    lines = [_line(label, reckoned[name], device, done.get(name, ""), host.get(name, 0)) for label, name in named]
    return lines, device.name, notes


@dataclass(frozen=True)
class _Read:
    """Image and text questions, as far as they could be read. lengths: tokens of each image question; text_prompt:
    tokens of the longest text question; notes: what was assumed, in words."""

    questions: list[Question]
    text: list[Question]
    lengths: list[int]
    text_prompt: int
    notes: tuple[str, ...]


def _read(recipe: Recipe, method: GatedMethod, alignment: Alignment, folder: Path, faults: Faults) -> _Read:
    """Read the questions, and check servers, the VLM's class and its processor."""
    from vlmgraft.distillation.servers import check_servers
    from vlmgraft.hf.models import empty_vlm
    from vlmgraft.hf.modules import match_projections

    calibration, questions, text = method.calibration, list[Question](), list[Question]()
    with faults.collected():
        questions = calibration_questions(method)
    with faults.collected():
        donors = text_questions(recipe) if isinstance(method, Frism) and method.inject == "donor" else []
        text = [question for of_donor in donors for question in of_donor]
    with faults.collected():
        donors_at = [alignment.donor.path, *(Path(more.donor) for more in recipe.more_donors)]
        check_servers(recipe, method, alignment.vlm.path, donors_at)
    with faults.collected():
        match_projections(empty_vlm(folder), [tensor.name for tensor in alignment.merged])
    count, text_prompt = len(questions) or calibration.samples + calibration.held_out, ASSUMED_TEXT
    assumed = f"the questions were not read: {count} of {ASSUMED_PROMPT} tokens each are assumed"
    lengths = [ASSUMED_PROMPT] * count
    with faults.collected():
        lengths = _prompt_lengths(folder, questions, calibration.max_new_tokens) if questions else lengths
    with faults.collected():
        text_prompt = max(_prompt_lengths(folder, text, method.donor_length)) if text else text_prompt
    return _Read(questions, text, lengths, text_prompt, () if questions else (assumed,))


def _device(alignment: Alignment, faults: Faults) -> tuple[Device, tuple[Any, Any]]:
    """The device that times are predicted for, and the torch device and dtype of the work."""
    from vlmgraft.costs.device import device_of
    from vlmgraft.hf.placement import default_device, learning_dtype

    place: tuple[Any, Any] = (None, None)
    with faults.collected():
        at, tensors = default_device(), alignment.vlm.tensors.values()
        place = at, learning_dtype(at, sum(info.elements for info in tensors), {info.dtype for info in tensors})
    return device_of(*place), place


def _load(method: GatedMethod, lengths: Sequence[int], matched: int, text_prompt: int) -> Work:
    """A method's work on questions, all as long as the longest, and on `matched` text questions of `text_prompt`
    tokens."""
    from vlmgraft.costs.cost import Work
    from vlmgraft.distillation.fits import largest_batch
    from vlmgraft.distillation.trainer import Training

    calibration, frism = method.calibration, method if isinstance(method, Frism) else None
    count, prompt = len(lengths), max(lengths)
    held_out = min(calibration.held_out, max(0, count - calibration.samples))
    learned, length = count - held_out, prompt + calibration.max_new_tokens
    return Work(
        rank=method.rank if isinstance(method.rank, int) else "full",
        questions=learned,
        held_out=held_out,
        prompt=prompt,
        answer=calibration.max_new_tokens,
        batch=largest_batch(calibration, count, prompt),
        answered=max(1, min(calibration.answer_batch_size, count, calibration.answer_batch_tokens // length)),
        steps=frism.steps if frism else -(-learned // calibration.batch_size),
        budget=frism is not None and frism.kl_budget is not None,
        observe_every=Training(learning_rate=frism.learning_rate).observe_every if frism else 1,
        matched=matched,
        text_prompt=text_prompt,
        text_answer=method.donor_length,
        served=calibration.endpoint is not None,
        donor_served=frism is not None and frism.donor_endpoint is not None,
    )


def _held(alignment: Alignment, rank: Any) -> list[str]:
    """The share of ‖τ‖² that `rank` directions keep in the middle layer, if donor and base are on this machine."""
    sources = (alignment.donor, alignment.donor_base)
    local = all(file.is_file() for source in sources if source is not None for file in source.files)
    if not isinstance(rank, int) or not local:
        return []
    from vlmgraft.spectral.krylov import MAX_RANK, share_kept
    from vlmgraft.spectral.task_vector import TaskVectors

    if rank > MAX_RANK:
        return []
    middle = alignment.layers // 2
    with TaskVectors(alignment) as taus:
        names = [
            tensor.name for tensor in alignment.merged if tensor.layer == middle and len(taus.shape(tensor.name)) == 2
        ]
        loaded = [taus.load(name) for name in names]
    whole = sum(float(tau.double().square().sum()) for tau in loaded)
    if not whole:
        return []
    kept = sum(share_kept(tau, rank) * float(tau.double().square().sum()) for tau in loaded) / whole
    return [f"rank {rank} holds about {kept:.1%} of ‖τ‖² (in layer {middle}); rank: full holds all"]


def _prompt_lengths(folder: Path, questions: Sequence[Question], answer: int) -> list[int]:
    """Tokens of questions with their images, by the chat template and the processor; raises DataError if prompt and
    answer are longer than the model's context, CheckpointError if there is no processor."""
    from vlmgraft.hf.batches import check_lengths
    from vlmgraft.hf.models import load_config, load_processor

    return check_lengths(load_config(folder), load_processor(folder), questions, answer)


def _done(work: Path | None, matrices: int) -> dict[str, str]:
    """What a work folder already holds, by stage of the cost model. The merge itself checks whether it was made from
    these inputs, and makes again what was not."""
    if work is None or not work.is_dir():
        return {}
    done: dict[str, str] = {}
    factors = len([*(work / "factors").glob("*.safetensors")])
    if factors:
        done["decompose"] = f"{min(factors, matrices)} of {matrices} matrices are in {work / 'factors'}"
    batches = len([*work.glob("gates.teacher/*")])
    if batches:
        done["teacher"] = f"{batches} batches are in {work / 'gates.teacher'}"
    if (work / "gates" / "gates.json").is_file():
        done["gates"] = f"gates are in {work / 'gates'}"
    elif (work / "gates.state").is_file():
        done["gates"] = "was begun"
    return done


def _line(label: str, stage: Stage, device: Device, done: str, offloaded: int) -> StageCost:
    """A stage of the cost model; folding, and every stage without a GPU, uses host memory."""
    on_host = stage.name == "fold" or not device.is_gpu
    gpu, host = (0, int(stage.memory)) if on_host else (int(stage.memory), 0)
    return StageCost(label, stage.seconds, gpu, host + offloaded, int(stage.written), done)
