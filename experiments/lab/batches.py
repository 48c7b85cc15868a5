"""A text model on batches of the lab's questions: encoding, loss, greedy answers, and the optimiser's loop.

A scene reaches the text model told in words, or as the vision tower's tokens in place of the image tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from experiments.lab import models, tasks
from vlmgraft.lab import world
from vlmgraft.lab.world import ExamItem

WORDS = tasks.vocabulary()
INDEX = {word: index for index, word in enumerate(WORDS)}
PAD, END, IMAGE = INDEX["<pad>"], INDEX["<|im_end|>"], INDEX["<|image_pad|>"]


@dataclass(frozen=True)
class Batch:
    """Padded questions with answers, int64 `[batch, time]`; `labels` are −100 outside the answer."""

    ids: Tensor
    labels: Tensor
    mask: Tensor


def encode(items: Sequence[ExamItem], as_image: Sequence[bool]) -> Batch:
    """Questions as the chat template writes them, in image or in text form, right-padded."""
    rows = []
    for item, image in zip(items, as_image, strict=True):
        scene_tokens = ["<|vision_start|>", *["<|image_pad|>"] * 8, "<|vision_end|>"] if image else []
        question = scene_tokens + (item.question if image else item.text_question).split()
        chat = ["<|im_start|>", "user", *question, "<|im_end|>", "<|im_start|>", "assistant"]
        said = [*item.answer.split(), "<|im_end|>"]
        rows.append(([INDEX[word] for word in chat], [INDEX[word] for word in said]))
    length = max(len(prompt) + len(answer) for prompt, answer in rows)
    ids = torch.full((len(rows), length), PAD)
    labels = torch.full((len(rows), length), -100)
    for row, (prompt, answer) in enumerate(rows):
        end = len(prompt) + len(answer)
        ids[row, :end] = torch.tensor(prompt + answer)
        labels[row, len(prompt) : end] = torch.tensor(answer)
    return Batch(ids, labels, (ids != PAD).long())


class Tower:
    """The VLM's vision tower with the lab's image processor: scenes in, visual tokens out."""

    def __init__(self, seed: int, glyphs: world.Glyphs = "handwriting") -> None:
        self.glyphs = glyphs
        self.vlm = models.build_vlm(seed)
        self.processor = models.build_processor()

    def see(self, rng: np.random.Generator, items: Sequence[ExamItem], split: world.Split = "train") -> Tensor:
        """Visual tokens `[items, 8, hidden]` of freshly drawn images of the items' scenes."""
        images = [world.render(rng, item.scene, split, self.glyphs) for item in items if item.scene is not None]
        pixels = self.processor.image_processor(images=images, return_tensors="pt")
        tokens = self.vlm.model.get_image_features(pixels["pixel_values"], pixels["image_grid_thw"])
        tokens = getattr(tokens, "pooler_output", tokens)
        return torch.stack([part.reshape(8, -1) for part in tokens])


def loss_of(model: Any, batch: Batch, visual: Tensor | None = None, noise: float = 0.0) -> Tensor:
    """Cross-entropy on the answers; `visual` replaces image tokens, `noise` (in units of the rms) blurs the others."""
    embeds = model.model.embed_tokens(batch.ids)
    if noise:
        embeds = embeds + noise * embeds.pow(2).mean().sqrt() * torch.randn_like(embeds)
    if visual is not None and len(visual):
        embeds = embeds.masked_scatter((batch.ids == IMAGE)[..., None], visual.reshape(-1, embeds.shape[-1]))
    hidden = model.model(inputs_embeds=embeds, attention_mask=batch.mask).last_hidden_state
    wanted = batch.labels[:, 1:] != -100
    return F.cross_entropy(model.lm_head(hidden[:, :-1][wanted]), batch.labels[:, 1:][wanted])


@torch.inference_mode()
def answers(model: Any, items: Sequence[ExamItem], tower: Tower | None = None) -> list[str]:
    """Greedy answers; with `tower` the scenes are shown as validation images, else told. Empty when it never ends."""
    blanks = [ExamItem(item.task, item.question, "", item.scene) for item in items]
    shown = [tower is not None and item.scene is not None for item in items]
    ids = [encode([blank], [image]).ids[0, :-1] for blank, image in zip(blanks, shown, strict=True)]
    groups: dict[tuple[int, bool], list[int]] = {}
    for index, (row, image) in enumerate(zip(ids, shown, strict=True)):
        groups.setdefault((len(row), image), []).append(index)
    said = [""] * len(items)
    for (_, image), members in groups.items():
        prompt = torch.stack([ids[index] for index in members])
        embeds = model.model.embed_tokens(prompt)
        if tower is not None and image:
            visual = tower.see(np.random.default_rng(len(items)), [items[index] for index in members], "validation")
            embeds = embeds.masked_scatter((prompt == IMAGE)[..., None], visual.reshape(-1, embeds.shape[-1]))
        mask = torch.ones_like(prompt)
        out = model.generate(inputs_embeds=embeds, attention_mask=mask, max_new_tokens=26, do_sample=False)
        for index, tokens in zip(members, out.tolist(), strict=True):
            words = [WORDS[token] for token in tokens]
            said[index] = " ".join(words[: words.index("<|im_end|>")]) if "<|im_end|>" in words else ""
    return said


def accuracy(model: Any, items: Sequence[ExamItem], tower: Tower | None = None) -> float:
    """Share of items answered exactly (of a sum: its final number) by greedy decoding."""
    model.eval()
    right = 0
    for item, said in zip(items, answers(model, items, tower), strict=True):
        both = said.split(), item.answer.split()
        right += both[0][-1:] == both[1][-1:] if item.task == "sum" else both[0] == both[1]
    model.train()
    return right / len(items)


def fit(
    model: Any,
    make_loss: Callable[[], Tensor],
    *,
    lr: float,
    steps: int,
    cosine: bool = False,
    warmup: int = 50,
    every: int = 100,
    stop: Callable[[int], bool] | None = None,
) -> None:
    """AdamW with warm-up (and cosine decay) up to `steps`, or until `stop` says so, asked every `every` steps."""
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimiser = torch.optim.AdamW(trainable, lr=lr, betas=(0.9, 0.98), weight_decay=0.0)
    for step in range(1, steps + 1):
        decay = 0.5 * (1 + np.cos(np.pi * step / steps)) if cosine else 1.0
        optimiser.param_groups[0]["lr"] = lr * min(1.0, step / warmup) * decay
        loss = make_loss()
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trainable, 1.0)
        optimiser.step()
        if stop is not None and step % every == 0 and stop(step):
            return
