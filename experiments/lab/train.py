"""Training of the lab trio: base LLM, vision tower, VLM and donor, each stopped by measurement.

The text model of the VLM is trained as a plain `Qwen2ForCausalLM` whose image tokens are replaced by the tower's
output, and copied into the VLM at the end: with the lab's rotary sections the two compute the same function.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.utils.logging import disable_progress_bar

from experiments.lab import models, tasks
from experiments.lab.batches import INDEX, Tower, accuracy, answers, encode, fit, loss_of
from vlmgraft.lab import world
from vlmgraft.lab.world import ExamItem
from vlmgraft.storage.jsonl import write_json
from vlmgraft.storage.outputs import refuse_output
from vlmgraft.storage.publish import new_folder

Report = Callable[[str], None]
Mix = dict[str, float]
READING: Mix = {"colour": 1, "glyph": 1, "read": 1, "copy": 1}
ALIGNED_TASKS = ("colour", "glyph", "read")


@dataclass
class Trainer:
    """Trains the trio of one seed; `report` gets a line per measurement, `measured` collects them for training.json."""

    seed: int
    report: Report = print
    glyphs: world.Glyphs = "handwriting"
    measured: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.started = time.monotonic()
        kinds = (*world.PERCEPTION, "sum", *tasks.TEXT_ONLY)
        self.validation = {task: tasks.draw_items(1000 + self.seed, "validation", (task,), 200) for task in kinds}

    def base(self) -> Any:
        """The base LLM: reading, then arithmetic facts, then chain of thought until it solves 30 % of the text sums."""
        model, rng = models.build_text_model(self.seed), np.random.default_rng([self.seed, 1])

        def learn(
            stage: str, mix: Mix, batch: int, steps: int, every: int, enough: Callable[[dict[str, float]], bool]
        ) -> None:
            def loss() -> Tensor:
                return loss_of(model, encode(_draw(rng, mix, batch), [False] * batch))

            def stop(step: int) -> bool:
                scores = self._measure(model, tuple(mix))
                self._say(f"base, {stage}, step {step}", scores)
                return enough(scores)

            fit(model, loss, lr=1.5e-3, steps=steps, every=every, stop=stop)

        learn("reading", READING, 64, 3000, 200, lambda scores: min(scores.values()) >= 0.99)
        learn("facts", {**READING, "fact": 4}, 64, 3000, 200, lambda scores: min(scores.values()) >= 0.98)
        thinking: Mix = {**READING, "fact": 3, "sum": 0.87}
        learn(
            "chain of thought", thinking, 48, 1500, 25, lambda scores: scores["sum"] >= 0.3 and scores["colour"] >= 0.97
        )
        return model

    def tower(self, base: Any) -> Tower:
        """A vision tower that speaks the base's word embeddings: squared distance plus a soft nearest-word term."""
        tower, rng = Tower(self.seed, self.glyphs), np.random.default_rng([self.seed, 2])
        words = [*world.COLOURS, *world.SHAPES, *world.DIGITS]
        embeddings = base.model.embed_tokens.weight.detach()[[INDEX[word] for word in words]]
        variance = embeddings.var(0).sum()

        def distances(items: list[ExamItem], split: world.Split, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
            seen = tower.see(rng, items, split).flatten(0, 1)
            targets = [words.index(word) for item in items if item.scene for word in item.scene.words]
            return torch.cdist(seen, embeddings).pow(2) / variance, torch.tensor(targets)

        def loss() -> Tensor:
            distance, targets = distances([tasks.draw_item(rng, "read") for _ in range(32)], "train", rng)
            return distance.gather(1, targets[:, None]).mean() + 0.5 * F.cross_entropy(-8 * distance, targets)

        fit(tower.vlm.model.visual, loss, lr=2e-3, steps=800, cosine=True)
        tower.vlm.requires_grad_(False)
        with torch.inference_mode():
            distance, targets = distances(self.validation["read"], "validation", np.random.default_rng(5))
        right = (distance.argmin(1) == targets).float().reshape(-1, 2).mean(0).tolist()
        self._say("tower", dict(zip(("colour tile", "glyph tile"), right, strict=True)))
        return tower

    def donor(self, base: Any) -> Any:
        """The reasoning LLM: the base tuned on text sums with a chain of thought, under noise on its embeddings, so
        that it also reads what is near a word and not only the word itself."""
        donor, rng = _copy_with_frozen_words(base), np.random.default_rng([self.seed, 3])
        torch.manual_seed(self.seed)
        mix: Mix = {"sum": 4, "colour": 0.2, "glyph": 0.2, "read": 0.2, "fact": 0.4}

        def loss() -> Tensor:
            return loss_of(donor, encode(_draw(rng, mix, 48), [False] * 48), noise=0.3)

        fit(donor, loss, lr=6e-4, steps=350, cosine=True)
        self._say("donor, text", self._measure(donor, ("sum", *ALIGNED_TASKS)))
        return donor

    def vlm(self, base: Any, tower: Tower) -> Any:
        """The VLM's text model: image perception and the listing of colours, while the base's own answers to text sums
        are replayed, so that it forgets nothing of its reasoning and learns none. The tower stays as it is."""
        vlm, rng = _copy_with_frozen_words(base), np.random.default_rng([self.seed, 4])
        sums = tasks.draw_items(self.seed, "train", ("sum",), 2000)
        replay = [
            ExamItem(i.task, i.question, said, i.scene)
            for i, said in zip(sums, answers(base, sums), strict=True)
            if said
        ]
        shares = {"colour": 1, "glyph": 1, "read": 1, "list_colours": 3, "fact": 1, "told": 0.3, "replay": 0.4}

        def loss() -> Tensor:
            items, shown = [], []
            for kind in rng.choice(list(shares), 48, p=np.array(list(shares.values())) / sum(shares.values())):
                as_text = kind in ("told", "replay")
                task = str(rng.choice(ALIGNED_TASKS)) if as_text else str(kind)
                items.append(replay[rng.integers(len(replay))] if kind == "replay" else tasks.draw_item(rng, task))
                shown.append(not as_text and kind != "fact")
            visual = tower.see(rng, [item for item, image in zip(items, shown, strict=True) if image])
            return loss_of(vlm, encode(items, shown), visual)

        fit(vlm, loss, lr=3e-4, steps=500, cosine=True)
        self._say("vlm, image", self._measure(vlm, (*world.PERCEPTION, "sum"), tower))
        return vlm

    def _measure(self, model: Any, kinds: Sequence[str], tower: Tower | None = None) -> dict[str, float]:
        return {task: accuracy(model, self.validation[task], tower) for task in kinds}

    def _say(self, what: str, scores: dict[str, float]) -> None:
        self.measured[what] = {name: round(score, 4) for name, score in scores.items()}
        figures = ", ".join(f"{name} {100 * score:.1f} %" for name, score in scores.items())
        self.report(f"[{time.monotonic() - self.started:4.0f} s] {what}: {figures}")


def train_trio(seed: int, out: Path, report: Report = print, glyphs: world.Glyphs = "handwriting") -> Path:
    """Train base, VLM and donor of one seed and write them as bf16 folders `base`, `vlm`, `donor` under `out`.

    About 12 minutes on one core. `training.json` keeps what was measured on the way, on validation items.
    Raises OutputError when `out` exists.
    """
    refuse_output(out)
    disable_progress_bar()
    trainer = Trainer(seed, report, glyphs)
    base = trainer.base()
    tower = trainer.tower(base)
    donor, text = trainer.donor(base), trainer.vlm(base, tower)
    vlm = tower.vlm
    vlm.model.language_model.load_state_dict(text.model.state_dict())
    vlm.lm_head.load_state_dict(text.lm_head.state_dict())
    seconds = round(time.monotonic() - trainer.started)
    facts = {"seed": seed, "glyphs": glyphs, "seconds": seconds, "measured": trainer.measured}
    with new_folder(out) as folder:
        models.save(base, folder / "base")
        models.save(donor, folder / "donor")
        models.save(vlm, folder / "vlm", tower.processor)
        write_json(folder / "training.json", facts)
    return out


def _draw(rng: np.random.Generator, mix: Mix, count: int) -> list[ExamItem]:
    kinds = rng.choice(list(mix), count, p=np.array(list(mix.values())) / sum(mix.values()))
    return [tasks.draw_item(rng, kind) for kind in kinds.tolist()]


def _copy_with_frozen_words(base: Any) -> Any:
    """A copy whose embeddings and head stay the base's, as all three models share one vocabulary."""
    model = copy.deepcopy(base)
    model.model.embed_tokens.weight.requires_grad_(False)
    model.lm_head.weight.requires_grad_(False)
    return model
