"""The stages of a trio up to the VLM: base, tower with projector, the base's own answers, VLM. Each finished folder or
file is left as it is, and an interrupted tuning goes on from its checkpoint."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from experiments.pretrained import models, scenes, tuning
from experiments.pretrained.scenes import Example
from experiments.pretrained.tuning import BATCH, IMAGE_TOKEN, Report, Schedule
from vlmgraft.lab import world
from vlmgraft.storage.jsonl import write_json
from vlmgraft.storage.publish import new_folder

LOGIT_SCALE = 10.0
WORD_LOSS = 0.3
"""Weight of the cross-entropy over the words beside the squared distance."""


@dataclass(frozen=True)
class Sizes:
    """Steps and counts of every stage; `Sizes.smoke()` is what CI runs."""

    pictures: int = 16000
    tower_steps: int = 900
    tower_batch: int = 128
    donor_steps: int = 110
    vlm_steps: int = 160
    vlm_pictures: int = 6000
    replayed_sums: int = 250
    general: int = len(scenes.GENERAL_PROMPTS)
    grpo_steps: int = 100
    distil_steps: int = 60
    eval_questions: int = 200
    exam: int = 150
    calibration: int = 256
    held_out: int = 128
    gate_steps: int = 50
    tune_steps: int = 60

    @classmethod
    def smoke(cls) -> Sizes:
        """A few steps of everything."""
        return cls(64, 2, 16, 2, 2, 32, 4, 4, 1, 1, 4, 3, 4, 4, 1, 1)


@dataclass
class Trio:
    """One trio in a folder: `base` is shared by all seeds, everything else lies in `seed-N`."""

    root: Path
    seed: int
    sizes: Sizes
    report: Report = print

    @property
    def base(self) -> Path:
        """The text model that everything starts from."""
        return self.root / "base"

    @property
    def folder(self) -> Path:
        """What belongs to this seed."""
        return self.root / f"seed-{self.seed}"

    def rng(self, *stream: int) -> np.random.Generator:
        """A random stream of this seed."""
        return np.random.default_rng([self.seed, *stream])

    def make_base(self) -> Path:
        """The bf16 folder of the base."""
        return self.base if self.base.is_dir() else models.make_base(self.base)

    def noted(self, name: str, began: float, facts: dict[str, Any]) -> None:
        """Keep what a stage measured in `measured.json`, and report it."""
        path = self.folder / "measured.json"
        known = json.loads(path.read_text()) if path.is_file() else {}
        write_json(path, {**known, name: {**facts, "seconds": round(time.monotonic() - began)}})
        self.report(f"{name}: {facts}, {time.monotonic() - began:.0f} s")

    def finish(self, out: Path, model: Any, processor: Any, checkpoint: Path) -> Path:
        """Publish a stage's model in bf16 with its processor or tokenizer, and drop its checkpoint."""
        with new_folder(out) as part:
            model.to(torch.bfloat16).save_pretrained(part)
            processor.save_pretrained(part)
        checkpoint.unlink(missing_ok=True)
        return out

    # --- tower and projector -------------------------------------------------------------------------------------

    def pictures(self, count: int, split: world.Split, stream: int) -> tuple[Tensor, list[world.Scene]]:
        """uint8 `[count, 3, 64, 64]` and the scenes that they show."""
        rng = self.rng(stream)
        drawn = [world.draw_scene(rng, only_digits=True) for _ in range(count)]
        pixels = np.stack([scenes.picture(rng, scene, split) for scene in drawn])
        return torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous(), drawn

    def tower(self) -> Path:
        """A VLM whose tower and projector are aligned, alone, to the base's own word embeddings."""
        out = self.folder / "aligned"
        if out.is_dir():
            return out
        began = time.monotonic()
        torch.manual_seed(self.seed)
        base, tokenizer = models.load_text(self.make_base())
        model, processor = models.shell(base.float(), tokenizer)
        model.to(base.device)
        pictures, drawn = self.pictures(self.sizes.pictures, "train", 1)
        alignment = WordAlignment(model, tokenizer, pictures, drawn)
        trained = [p for name, p in model.named_parameters() if "vision_tower" in name or "projector" in name]
        for parameter in model.parameters():
            parameter.requires_grad_(False)
        for parameter in trained:
            parameter.requires_grad_(True)
        schedule = Schedule(self.sizes.tower_steps, 1e-3, warmup=30, every=50)

        def loss(step: int) -> Tensor:
            return alignment.loss(self.rng(2, step).integers(0, len(drawn), self.sizes.tower_batch))

        tuning.tune(trained, loss, schedule, self.folder / "tower.pt", self.report)
        held_out = WordAlignment(model, tokenizer, *self.pictures(self.sizes.eval_questions, "validation", 3))
        self.noted("tower", began, held_out.accuracy())
        return self.finish(out, model, processor, self.folder / "tower.pt")

    # --- what the base says --------------------------------------------------------------------------------------

    def replay(self) -> dict[str, list[dict[str, Any]]]:
        """The base's own sampled answers: "general" to prompts that have nothing to do with scenes, "sums" to sums of
        the first training scenes told in text (`scene` is their number) and to word problems."""
        path = self.folder / "replay.json"
        if path.is_file():
            return json.loads(path.read_text())
        began = time.monotonic()
        torch.manual_seed(self.seed)
        model, tokenizer = models.load_text(self.make_base())
        general = scenes.GENERAL_PROMPTS[: self.sizes.general]
        rng = self.rng(4)
        _, drawn = self.vlm_scenes(self.sizes.replayed_sums)
        sums = [scenes.sum_example(rng, scene) for scene in drawn]
        words = [scenes.word_problem(rng) for _ in range(len(sums) // 4)]
        prompts = [*general, *(example.text_prompt for example in [*sums, *words])]
        outputs = tuning.generate(model.eval(), tokenizer, prompts, 40, temperature=0.7)
        said = outputs[len(general) :]
        right = [scenes.is_right(e, output) for e, output in zip([*sums, *words], said, strict=True)]
        numbers = [*range(len(sums)), *(None for _ in words)]
        rows = {
            "general": [{"question": q, "answer": a} for q, a in zip(general, outputs, strict=False)],
            "sums": [
                {"question": e.question, "answer": a, "scene": number}
                for e, a, number in zip([*sums, *words], said, numbers, strict=True)
            ],
        }
        write_json(path, rows)
        self.noted("base", began, {"sums": np.mean(right[: len(sums)]), "words": np.mean(right[len(sums) :])})
        return rows

    # --- VLM -----------------------------------------------------------------------------------------------------

    def vlm_scenes(self, count: int) -> tuple[np.random.Generator, list[world.Scene]]:
        """The scenes of the VLM's training pictures, in order."""
        rng = self.rng(5)
        return rng, [world.draw_scene(rng, only_digits=True) for _ in range(count)]

    def vlm(self, replay_sums: bool) -> Path:
        """The VLM: tower frozen and its tokens cached, projections tuned on perception; with `replay_sums` a fifth of
        the rows are the base's own, mostly wrong, answers to sums, in text and for the same scenes as pictures."""
        name = "vlm-replay" if replay_sums else "vlm"
        out = self.folder / name
        if out.is_dir():
            return out
        from transformers import AutoProcessor, LlavaForConditionalGeneration

        began = time.monotonic()
        aligned = self.tower()
        replay = self.replay()
        model = LlavaForConditionalGeneration.from_pretrained(aligned, dtype=models.training_dtype())
        model.to("cuda" if torch.cuda.is_available() else "cpu")
        processor = AutoProcessor.from_pretrained(aligned)
        parameters = tuning.trainable_projections(model)
        data = PerceptionData(self, model, processor.tokenizer, replay, replay_sums)
        checkpoint = self.folder / f"{name}.pt"
        tuning.tune(parameters, data.loss, Schedule(self.sizes.vlm_steps, 1e-4), checkpoint, self.report)
        self.noted(name, began, ask_vlm(self, models.rounded(model.eval()), processor))
        return self.finish(out, model, processor, checkpoint)


class WordAlignment:
    """Pictures with the embeddings of the words that describe them.

    loss: squared distance over the words' mean square, plus cross-entropy over the words, which keeps digits apart.
    """

    def __init__(self, model: Any, tokenizer: Any, pictures: Tensor, drawn: list[world.Scene]) -> None:
        self.model, self.pictures = model, pictures
        self.embeddings = model.get_input_embeddings().weight.detach()
        self.ids = torch.tensor([tokenizer(scenes.described(scene)).input_ids for scene in drawn])
        colours = [tokenizer(f" {colour}").input_ids[0] for colour in world.COLOURS]
        shared = tokenizer(" red 3,").input_ids[1], tokenizer(",").input_ids[0]
        digits = [tokenizer(digit).input_ids[0] for digit in world.DIGITS]
        self.words = torch.tensor([*colours, *digits, *shared])
        self.vectors = self.embeddings[self.words.to(self.embeddings.device)]
        self.places = torch.full((len(self.embeddings),), -1)
        self.places[self.words] = torch.arange(len(self.words))

    def loss(self, chosen: np.ndarray) -> Tensor:
        """Of the chosen pictures."""
        at = torch.from_numpy(chosen)
        device = self.embeddings.device
        tokens = models.visual_tokens(self.model, self.pictures[at].to(device))
        ids = self.ids[at].to(device)
        distance = (tokens - self.embeddings[ids]).square().mean() / self.vectors.square().mean()
        logits = LOGIT_SCALE * tokens @ self.vectors.T / self.vectors.norm(dim=-1).square().mean()
        return distance + WORD_LOSS * F.cross_entropy(logits.flatten(0, 1), self.places.to(device)[ids].flatten())

    @torch.no_grad()
    def accuracy(self) -> dict[str, float]:
        """How often the nearest word is the right one, for colours and for digits."""
        device = self.embeddings.device
        tokens = models.visual_tokens(self.model, self.pictures.to(device))
        nearest = self.words.to(device)[torch.cdist(tokens, self.vectors).argmin(-1)]
        right = (nearest == self.ids.to(device)).view(-1, world.CELLS, 4).double().mean((0, 1))
        return {"colour": float(right[0]), "digit": float(right[2])}


class PerceptionData:
    """The VLM's training rows: 70 % pictures, 15 % told scenes, 15 % general replay; sums where they are replayed."""

    def __init__(self, trio: Trio, model: Any, tokenizer: Any, replay: dict[str, Any], replay_sums: bool) -> None:
        self.trio, self.model, self.tokenizer, self.replay = trio, model, tokenizer, replay
        self.sum_share = 0.2 if replay_sums else 0.0
        rng, self.scenes = trio.vlm_scenes(trio.sizes.vlm_pictures)
        pixels = np.stack([scenes.picture(rng, scene, "train") for scene in self.scenes])
        pictures = torch.from_numpy(pixels).permute(0, 3, 1, 2)
        device = model.device
        with torch.no_grad():
            parts = [models.visual_tokens(model, part.to(device)) for part in pictures.split(500)]
        self.tokens = torch.cat(parts)
        self.image = tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
        self.embeddings = model.get_input_embeddings().weight

    def loss(self, step: int) -> Tensor:
        """Of the rows of one step."""
        rng = self.trio.rng(6, step)
        rows, shown = [], []
        for question, answer, number in (self._draw(rng) for _ in range(BATCH)):
            rows.append(tuning.row_of(self.tokenizer, question, answer))
            if number is not None:
                shown.append(self.tokens[number])
        ids, labels = (part.to(self.model.device) for part in tuning.collate(rows, self.tokenizer.eos_token_id))
        inputs = F.embedding(ids, self.embeddings)
        if shown:
            inputs = inputs.masked_scatter((ids == self.image)[..., None], torch.stack(shown).to(inputs))
        return tuning.answer_loss(self.model.model.language_model, self.embeddings, inputs, labels)

    def _draw(self, rng: np.random.Generator) -> tuple[str, str, int | None]:
        """Question, answer and the picture that is shown with it, None for text."""
        if rng.random() < self.sum_share:
            row = self.replay["sums"][rng.integers(len(self.replay["sums"]))]
            if row["scene"] is None:
                return row["question"], row["answer"], None
            example = Example(row["question"], row["answer"], "sum", self.scenes[row["scene"]])
            return self._as(example, row["scene"] if rng.random() < 0.5 else None)
        share = rng.random()
        if share < 0.85:
            number = int(rng.integers(len(self.scenes)))
            return self._as(scenes.perception_example(rng, self.scenes[number]), number if share < 0.7 else None)
        row = self.replay["general"][rng.integers(len(self.replay["general"]))]
        return row["question"], row["answer"], None

    def _as(self, example: Example, number: int | None) -> tuple[str, str, int | None]:
        return (shown(example.question) if number is not None else example.text_prompt), example.answer, number


def shown(question: str) -> str:
    """The question below its picture."""
    return f"Cards:{IMAGE_TOKEN * scenes.IMAGE_TOKENS}\n{question}"


@torch.no_grad()
def ask_vlm(trio: Trio, model: Any, processor: Any) -> dict[str, float]:
    """Perception, sums and the share of answers with a chain, on pictures of the validation split; greedy."""
    rng, tokenizer = trio.rng(7), processor.tokenizer
    tokenizer.padding_side = "left"
    looked = [scenes.perception_example(rng) for _ in range(trio.sizes.eval_questions)]
    summed = [scenes.sum_example(rng) for _ in range(trio.sizes.eval_questions)]
    outputs: list[str] = []
    examples = [*looked, *summed]
    for start in range(0, len(examples), 50):
        part = examples[start : start + 50]
        inputs = tokenizer([tuning.prompt_of(shown(e.question)) for e in part], return_tensors="pt", padding=True).to(
            model.device
        )
        pixels = [Image.fromarray(scenes.picture(rng, e.scene, "validation")) for e in part if e.scene]
        values = processor.image_processor(images=pixels, return_tensors="pt")["pixel_values"].to(model.device)
        made = model.generate(**inputs, pixel_values=values.to(model.dtype), max_new_tokens=48, do_sample=False)
        outputs += tokenizer.batch_decode(made[:, inputs.input_ids.shape[1] :], skip_special_tokens=True)
    right = [scenes.is_right(example, output) for example, output in zip(examples, outputs, strict=True)]
    chains = [scenes.has_chain(output) for output in outputs[len(looked) :]]
    return {
        "perception": float(np.mean(right[: len(looked)])),
        "sums": float(np.mean(right[len(looked) :])),
        "chains": float(np.mean(chains)),
    }
