"""Training, a few steps of every stage: what is trained moves, what is frozen stays, folders appear whole or not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from experiments.lab import batches, tasks, train
from vlmgraft.errors import OutputError


def test_labels_are_the_answers() -> None:
    items = [tasks.draw_item(np.random.default_rng(seed), task) for seed, task in enumerate(("sum", "read", "fact"))]
    batch = batches.encode(items, [True, False, False])
    for row, item in enumerate(items):
        wanted = batch.labels[row][batch.labels[row] != -100]
        assert [batches.WORDS[token] for token in wanted] == [*item.answer.split(), "<|im_end|>"]
        assert int(batch.mask[row].sum()) == int((batch.ids[row] != batches.PAD).sum())
        assert bool((batch.ids[row][batch.labels[row] != -100] == wanted).all())


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three steps per stage and few validation items, so that all stages run in seconds."""
    whole_fit, whole_draw = train.fit, tasks.draw_items

    def few(model: Any, make_loss: Any, **settings: Any) -> None:
        whole_fit(model, make_loss, **settings | {"steps": 3, "every": 2, "warmup": 1})

    monkeypatch.setattr(train, "fit", few)
    monkeypatch.setattr(tasks, "draw_items", lambda seed, split, tasks, count: whole_draw(seed, split, tasks, 4))
    for room in (train, batches):
        monkeypatch.setattr(room, "answers", lambda model, items, tower=None: ["red"] * len(items))


@pytest.mark.usefixtures("short")
def test_all_stages_run_and_leave_three_folders(tmp_path: Path) -> None:
    said: list[str] = []
    train.train_trio(5, tmp_path / "trio", report=said.append)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["trio"], "no partial folder"
    assert {path.name for path in (tmp_path / "trio").iterdir()} == {"base", "vlm", "donor", "training.json"}
    notes = json.loads((tmp_path / "trio" / "training.json").read_text())
    assert notes["seed"] == 5 and notes["glyphs"] == "handwriting"
    assert {"tower", "donor, text", "vlm, image"} <= set(notes["measured"])
    assert any("tower" in line for line in said)

    from safetensors.torch import load_file

    base, donor, vlm = (load_file(tmp_path / "trio" / name / "model.safetensors") for name in ("base", "donor", "vlm"))
    shared = {"embed_tokens.weight", "lm_head.weight"}
    own = {name.replace("model.language_model.", "model."): tensor for name, tensor in vlm.items()}
    for name, tensor in base.items():
        frozen = any(name.endswith(end) for end in shared)
        assert torch.equal(tensor, donor[name]) is frozen or "norm" in name, name
        assert name in own, name
        assert torch.equal(tensor, own[name]) is frozen or "norm" in name, name


def test_an_existing_folder_is_refused_before_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: Any) -> None:
        raise AssertionError("training began")

    monkeypatch.setattr(train, "Trainer", never)
    with pytest.raises(OutputError, match="exists"):
        train.train_trio(0, tmp_path)
    assert not list(tmp_path.iterdir())


def test_accuracy_counts_exact_answers_and_final_sums(monkeypatch: pytest.MonkeyPatch) -> None:
    items = [tasks.draw_item(np.random.default_rng(seed), task) for seed, task in enumerate(("read", "read", "sum"))]
    said = [items[0].answer, "1", f"anything {items[2].answer.split()[-1]}"]
    monkeypatch.setattr(batches, "answers", lambda model, asked, tower=None: said)
    assert batches.accuracy(torch.nn.Identity(), items) == pytest.approx(2 / 3)


def test_fit_stops_when_told() -> None:
    layer, asked = torch.nn.Linear(2, 1), []

    def stop(step: int) -> bool:
        asked.append(step)
        return step >= 4

    batches.fit(layer, lambda: layer(torch.ones(1, 2)).pow(2).sum(), lr=0.01, steps=100, every=2, stop=stop)
    assert asked == [2, 4]
