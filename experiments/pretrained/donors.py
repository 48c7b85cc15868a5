"""Donors of three kinds from one base, since the kind decides what a task vector looks like.

| kind       | learned from                                                                                        |
|------------|-----------------------------------------------------------------------------------------------------|
| supervised | chain-of-thought traces of scene sums told in text and of word problems, with noise on the prompts   |
| grpo       | a warm start of a few supervised steps, then TRL's GRPO with a rule reward: the last number is right  |
| distilled  | on-policy: its own samples, scored token by token by the supervised donor (reverse KL)                |
"""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from experiments.pretrained import models, scenes, tuning
from experiments.pretrained.stages import Trio
from experiments.pretrained.tuning import BATCH, Schedule

Kind = Literal["supervised", "grpo", "distilled"]
KINDS: tuple[Kind, ...] = get_args(Kind)
NOISE = 0.3
"""Of the words' root mean square, on prompts: the VLM's tower gives no exact word embeddings."""
WARM_STEPS = 20
SAMPLE_TOKENS = 48


def make_donor(trio: Trio, kind: Kind) -> Path:
    """The folder of a donor; made where it is not there. Raises CheckpointError without the base's package."""
    out = trio.folder / ("donor" if kind == "supervised" else f"donor-{kind}")
    if out.is_dir():
        return out
    if kind == "distilled":
        make_donor(trio, "supervised")  # the teacher
    began = time.monotonic()
    model, tokenizer = models.load_text(trio.make_base())
    before = {name: parameter.detach().float().clone() for name, parameter in model.named_parameters()}
    parameters = tuning.trainable_projections(model)
    checkpoint = trio.folder / f"donor-{kind}.pt"
    if kind == "supervised":
        tuning.tune(
            parameters, Traces(trio, model, tokenizer).loss, Schedule(trio.sizes.donor_steps, 2e-4), checkpoint,
            trio.report,
        )  # fmt: skip
    elif kind == "grpo":
        warm_up(trio, model, tokenizer, parameters)
        reinforce(trio, model, tokenizer)
    else:
        schedule = Schedule(trio.sizes.distil_steps, 1e-4)
        tuning.tune(parameters, OnPolicy(trio, model, tokenizer).loss, schedule, checkpoint, trio.report)
    models.rounded(model)
    trio.noted(out.name, began, {**ask_donor(trio, model.eval(), tokenizer), "tau": task_vector_norm(model, before)})
    return trio.finish(out, model, tokenizer, checkpoint)


class Traces:
    """Rows of the supervised donor: 55 % scene sums, 30 % word problems, 15 % the base's own general answers."""

    def __init__(self, trio: Trio, model: Any, tokenizer: Any) -> None:
        self.trio, self.model, self.tokenizer = trio, model, tokenizer
        self.general = trio.replay()["general"]
        self.embeddings = model.get_input_embeddings().weight
        words = tokenizer(" red green blue yellow 0 1 2 3 4 5 6 7 8 9").input_ids
        self.rms = NOISE * float(self.embeddings[words].detach().float().square().mean().sqrt())

    def loss(self, step: int) -> Tensor:
        """Of the rows of one step."""
        rng = self.trio.rng(8, step)
        rows = [tuning.row_of(self.tokenizer, *self._draw(rng)) for _ in range(BATCH)]
        ids, labels = (part.to(self.model.device) for part in tuning.collate(rows, self.tokenizer.eos_token_id))
        noise = torch.Generator().manual_seed(int(rng.integers(2**31)))
        inputs = tuning.with_noise(F.embedding(ids, self.embeddings), self.rms, labels == -100, noise)
        return tuning.answer_loss(self.model.model, self.embeddings, inputs, labels)

    def _draw(self, rng: np.random.Generator) -> tuple[str, str]:
        share = rng.random()
        if share < 0.85:
            example = scenes.sum_example(rng) if share < 0.55 else scenes.word_problem(rng)
            return example.text_prompt, example.answer
        row = self.general[rng.integers(len(self.general))]
        return row["question"], row["answer"]


def warm_up(trio: Trio, model: Any, tokenizer: Any, parameters: list[nn.Parameter]) -> None:
    """A few supervised steps, so that some samples are right and a reward can tell them apart."""
    steps = min(WARM_STEPS, trio.sizes.donor_steps)
    tuning.tune(parameters, Traces(trio, model, tokenizer).loss, Schedule(steps, 1e-4), trio.folder / "warm.pt")


def reinforce(trio: Trio, model: Any, tokenizer: Any) -> None:
    """TRL's GRPO in place: two prompts a step, eight samples of each, reward 1 for the right last number, no KL. The
    trainer's own checkpoints under `grpo` are gone on with."""
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer

    rng = trio.rng(9)
    examples = [scenes.sum_example(rng) if rng.random() < 0.7 else scenes.word_problem(rng) for _ in range(2048)]
    prompts = [tuning.prompt_of(example.text_prompt) for example in examples]
    data = Dataset.from_list([{"prompt": p, "answer": e.answer} for p, e in zip(prompts, examples, strict=True)])

    def correct(completions: list[str], answer: list[str], **_: Any) -> list[float]:
        pairs = zip(completions, answer, strict=True)
        return [float(scenes.final_number(output) == scenes.final_number(wanted)) for output, wanted in pairs]

    folder = trio.folder / "grpo"
    settings = GRPOConfig(
        output_dir=str(folder),
        max_steps=trio.sizes.grpo_steps,
        per_device_train_batch_size=16,
        num_generations=8,
        max_completion_length=SAMPLE_TOKENS,
        learning_rate=5e-6,
        lr_scheduler_type="cosine",
        beta=0.0,
        temperature=1.0,
        bf16=torch.cuda.is_available(),
        save_steps=20,
        save_total_limit=1,
        logging_steps=5,
        report_to=[],
        seed=trio.seed,
    )
    model.float()  # the optimiser's steps are below bf16's resolution
    trainer = GRPOTrainer(model, correct, settings, data, processing_class=tokenizer)
    trainer.train(resume_from_checkpoint=True if list(folder.glob("checkpoint-*")) else None)
    model.to(models.training_dtype())


class OnPolicy:
    """Reverse KL from the student to the teacher, exact per position, along the student's own samples."""

    def __init__(self, trio: Trio, model: Any, tokenizer: Any) -> None:
        self.trio, self.model, self.tokenizer = trio, model, tokenizer
        self.teacher = models.load_text(trio.folder / "donor")[0].eval()

    def loss(self, step: int) -> Tensor:
        """Sample answers to one step's prompts, and compare both models on them; mean over the samples' tokens."""
        rng = self.trio.rng(10, step)
        torch.manual_seed(int(rng.integers(2**31)))
        draws = (scenes.sum_example(rng) if rng.random() < 0.65 else scenes.word_problem(rng) for _ in range(BATCH))
        prompts = [example.text_prompt for example in draws]
        self.model.eval()
        outputs = tuning.generate(self.model, self.tokenizer, prompts, SAMPLE_TOKENS, temperature=1.0)
        self.model.train()
        rows = [tuning.row_of(self.tokenizer, *pair) for pair in zip(prompts, outputs, strict=True)]
        ids, labels = (part.to(self.model.device) for part in tuning.collate(rows, self.tokenizer.eos_token_id))
        kept = labels[:, 1:] != -100
        student = F.log_softmax(self.model(ids).logits[:, :-1][kept].float(), -1)
        with torch.no_grad():
            teacher = F.log_softmax(self.teacher(ids).logits[:, :-1][kept].float(), -1)
        return (student.exp() * (student - teacher)).sum(-1).mean()


BEYOND = 50
"""Told sums of five numbers and differences, of each."""


def ask_donor(trio: Trio, model: Any, tokenizer: Any) -> dict[str, float]:
    """Greedy scores on told sums and on word problems, the share of answers with a chain; and on told sums of the
    kinds that it is not tuned on, the first of the files "plus" and "minus" (see `exams`)."""
    rng, half = trio.rng(11), trio.sizes.eval_questions
    examples = [*(scenes.sum_example(rng) for _ in range(half)), *(scenes.word_problem(rng) for _ in range(half))]
    for stream, draw in ((17, scenes.fifth_number), (18, scenes.difference)):
        rng = trio.rng(stream)
        examples += [draw(rng) for _ in range(BEYOND)]
    outputs = tuning.generate(model, tokenizer, [example.text_prompt for example in examples], 64)
    right = [scenes.is_right(example, output) for example, output in zip(examples, outputs, strict=True)]
    chains = [scenes.has_chain(output) for output in outputs[: 2 * half]]
    return {
        "sums": float(np.mean(right[:half])),
        "words": float(np.mean(right[half : 2 * half])),
        "chains": float(np.mean(chains)),
        "plus": float(np.mean(right[2 * half : 2 * half + BEYOND])),
        "minus": float(np.mean(right[2 * half + BEYOND :])),
    }


def task_vector_norm(model: nn.Module, before: dict[str, Tensor]) -> float:
    """‖τ‖ over all parameters, of the bf16 weights as they are saved."""
    changes = (parameter.detach().float() - before[name] for name, parameter in model.named_parameters())
    return math.sqrt(sum(float(change.square().sum()) for change in changes))
