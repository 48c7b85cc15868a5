"""The teacher's work on disk: one batch is lost at most, and everything it depends on changes its key."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from experiments.lab.models import build_processor, build_vlm
from vlmgraft.data.questions import questions_digest
from vlmgraft.distillation import targets, teacher
from vlmgraft.distillation.cache import UnitCache, teacher_digest
from vlmgraft.distillation.targets import Targets
from vlmgraft.errors import OutputError
from vlmgraft.hf.batches import Question

Build = Callable[..., Targets]


@pytest.fixture
def build(vlm: Any, processor: Any, questions: list[Question], tmp_path: Path) -> Build:
    def run(asked: list[Question] = questions[:10], cache: Path | None = tmp_path / "cache", **options: Any) -> Targets:
        own, options = (vlm, processor), {"max_new_tokens": 4, "batch_size": 4, **options}
        return teacher.build_targets(own, own, asked, cache=cache, **options)

    return run


def watch(monkeypatch: pytest.MonkeyPatch, stop: int | None = None) -> list[int]:
    """Counts the batches that are answered, and interrupts at one of them."""
    calls: list[int] = []
    ordinary = teacher.generate_batch

    def counted(*args: Any) -> Any:
        calls.append(len(args[2]))
        if stop is not None and len(calls) > stop:
            raise KeyboardInterrupt
        return ordinary(*args)

    monkeypatch.setattr(teacher, "generate_batch", counted)
    return calls


def same(one: Targets, other: Targets) -> bool:
    pairs = zip(one.batches, other.batches, strict=True)
    return one.answers == other.answers and all(a.target.log_p.equal(b.target.log_p) for a, b in pairs)


def test_a_second_run_asks_the_teacher_nothing(build: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = build(cache=None)
    first = build()
    calls = watch(monkeypatch)
    monkeypatch.setattr(targets.Distribution, "of", classmethod(lambda *args: pytest.fail("read again")))
    second = build()
    assert calls == [] and same(first, second) and same(first, plain) and first.digest == second.digest


@pytest.mark.parametrize("top", [None, 5])
def test_an_interruption_costs_one_batch(
    build: Build, top: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if top is not None:  # likeliest tokens and a rest
        for module in (targets, teacher):
            monkeypatch.setattr(module, "FULL_VOCABULARY", 10)
    whole = build(cache=None)
    with monkeypatch.context() as patch:
        watch(patch, stop=2)
        with pytest.raises(KeyboardInterrupt):
            build()
    calls = watch(monkeypatch)
    assert same(build(), whole) and calls == [2], "two of three batches were kept"
    assert (whole.batches[0].target.ids is not None) == (top is not None)
    stray = next((tmp_path / "cache").iterdir()) / ".answers-0001.safetensors.123.tmp"
    stray.write_bytes(b"half")
    damaged = stray.with_name("answers-0001.safetensors")
    damaged.write_bytes(damaged.read_bytes()[:50])
    assert same(build(), whole) and not stray.exists()
    for left in (stray, stray.with_name(".tmpdbQGUc"), stray.with_name(".reading-0000.safetensors.1.2.tmp")):
        left.write_bytes(b"half")  # also where nothing is left to be written
    assert same(build(), whole) and not list(stray.parent.glob(".*"))


def test_everything_it_depends_on_changes_the_key(
    build: Build, vlm: Any, questions: list[Question], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    build()
    image = questions[0].images[0]
    assert isinstance(image, Image.Image)
    pixels = image.copy()
    pixels.putpixel((0, 0), (1, 2, 3))
    calls = watch(monkeypatch)
    for options in (
        {"asked": [Question(questions[0].question, (pixels,)), *questions[1:10]]},
        {"asked": [Question("sum", questions[0].images), *questions[1:10]]},
        {"max_new_tokens": 5},
        {"batch_size": 5},
    ):
        before = len(calls)
        build(**options)
        assert len(calls) > before, options
    before = len(calls)
    build(packing="length")
    build(tokens="all")
    build(seed=3)
    assert len(calls) == before, "the answers are the same, only their grouping differs"
    weight = vlm.lm_head.weight
    with torch.no_grad():
        weight[3, 3] += 1
        build()
        weight[3, 3] -= 1
    assert len(calls) > before


def test_a_copy_of_folder_and_images_keeps_the_key(tmp_path: Path, questions: list[Question]) -> None:
    from experiments.lab.models import save
    from vlmgraft.hf.models import load_processor, load_vlm

    save(build_vlm(0), tmp_path / "a")
    build_processor().save_pretrained(tmp_path / "a")
    (tmp_path / "a").rename(tmp_path / "b")
    save(build_vlm(0), tmp_path / "a")
    build_processor().save_pretrained(tmp_path / "a")
    one, other = ((load_vlm(tmp_path / name), load_processor(tmp_path / name)) for name in "ab")
    assert teacher_digest(*one) == teacher_digest(*other)
    for name in ("x.png", "y.png"):
        questions[0].images[0].save(tmp_path / name)  # type: ignore[union-attr]
    first, second = (questions_digest([Question("q", (tmp_path / name,))]) for name in ("x.png", "y.png"))
    assert first == second != questions_digest([Question("q")])


def test_another_template_is_another_teacher(vlm: Any) -> None:
    processor = build_processor()
    before = teacher_digest(vlm, processor)
    assert teacher_digest(vlm, build_processor()) == before
    processor.tokenizer.add_tokens(["<new>"])
    assert teacher_digest(vlm, processor) != before


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match=r"unit-0000.*cannot be written"):
        list(UnitCache(tmp_path / "file", "key").run("unit", 1, lambda index: {"x": torch.zeros(1)}))
