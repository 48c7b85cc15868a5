"""Items and suites: ids, digests, rotations of choices."""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, strategies as st
from PIL import Image

from vlmgraft.data.images import MAX_PIXELS
from vlmgraft.errors import DataError
from vlmgraft.evaluation.items import (
    Item,
    Suite,
    circular,
    image_size,
    merge_suites,
    open_image,
    rotations,
    unique,
    with_suffix,
)
from vlmgraft.evaluation.metrics import all_right


def test_circular_options_are_right_together_only() -> None:
    assert rotations(["x", "y", "z"]) == [("x", "y", "z"), ("y", "z", "x"), ("z", "x", "y")]
    assert all_right({"a": [1, 1, 1], "b": [1, 0, 1], "c": [0.5]}) == pytest.approx(1 / 3)


@given(st.lists(st.text("abc", min_size=1), min_size=2, max_size=6, unique=True), st.data())
def test_the_right_text_stays_right_in_every_rotation(choices: list[str], data: Any) -> None:
    place = data.draw(st.integers(0, len(choices) - 1))
    item = Item("q", "which?", answers=("ABCDEF"[place],), choices=tuple(choices))
    turned = circular([item])
    assert len({each.id for each in turned}) == len(choices) == len({each.choices for each in turned})
    assert {each.choices["ABCDEF".index(each.answers[0])] for each in turned} == {choices[place]}
    assert {each.group for each in turned} == {"q"}


def test_an_item_without_one_right_choice_is_not_turned() -> None:
    items = [Item("a", "?", answers=("4",)), Item("b", "?", answers=("A", "B"), choices=("x", "y"))]
    assert circular(items) == items


@given(st.lists(st.sampled_from(["x", "y", "x#2", "x#3"]), max_size=9))
def test_ids_become_unique_and_the_first_of_a_name_keeps_it(ids: list[str]) -> None:
    items, renamed = unique([Item(each, "?") for each in ids])
    assert len({item.id for item in items}) == len(ids)
    assert renamed == sum(item.id != name for item, name in zip(items, ids, strict=True)) == len(ids) - len(set(ids))


def test_several_suites_become_one_with_unique_ids(sums: Any) -> None:
    one, other = sums(2), sums(3)
    both = merge_suites([one, other])
    assert len({item.id for item in both.items}) == 5 and both.duplicates == 2


def test_a_suffix_stands_on_a_line_of_its_own_and_below_no_empty_question() -> None:
    assert with_suffix("why?", "Say.") == "why?\nSay." and with_suffix(" ", "Say.") == " "
    merged = merge_suites([Suite("a", (Item("1", "why?"),), "Say.", 5), Suite("b", (Item("1", "who?"),), "", 9)])
    assert [item.question for item in merged.items] == ["why?\nSay.", "who?"]
    assert (merged.suffix, merged.max_new_tokens) == ("", 9)


@pytest.mark.parametrize("change", [{"question": "2 + 2 ?"}, {"answers": ("3",)}, {"choices": ("2", "3")}])
def test_a_digest_changes_with_what_is_asked(change: dict[str, Any]) -> None:
    item = Item("1", "1 + 1 ?", answers=("2",))
    other = replace(item, **change)
    assert item.key != other.key and replace(item, task="sums").key == item.key
    assert Suite("s", (item,)).digest != Suite("s", (other,)).digest != Suite("s", (other,), "Say.").digest


def test_a_suites_digest_is_of_the_images_and_of_how_an_item_is_scored(tmp_path: Path) -> None:
    (tmp_path / "p.png").write_bytes(encoded("PNG"))
    item = Item("1", "?", (tmp_path / "p.png",), ("2",))
    before = Suite("s", (item,)).digest
    assert Suite("s", (replace(item, images=(encoded("PNG"),)),)).digest == before, "a path or its bytes are the same"
    others = [replace(item, kind="reasoning"), replace(item, metric="yes_no"), replace(item, precision=2)]
    assert len({before, *(Suite("s", (other,)).digest for other in others)}) == 4
    (tmp_path / "p.png").write_bytes(encoded("BMP"))
    changed = Suite("s", (item,)).digest
    (tmp_path / "p.png").unlink()
    assert len({before, changed, Suite("s", (item,)).digest}) == 3


def test_choices_that_stand_in_the_question_are_expected() -> None:
    assert Item("1", "Which?\nChoices:\nA: red\nB: blue").expected.choices == ("red", "blue")
    assert Item("1", "Which?\nChoices:\nA: red\nB: blue", choices=("x", "y")).expected.choices == ("x", "y")


def encoded(kind: str = "PNG", mode: str = "RGB") -> bytes:
    buffer = io.BytesIO()
    Image.new(mode, (8, 6), 1 if mode in ("L", "P") else (10, 20, 30, 40)[: len(mode)]).save(buffer, kind)
    return buffer.getvalue()


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM"])
def test_every_source_opens_in_rgb(kind: str, tmp_path: Path) -> None:
    data = encoded(kind)
    (tmp_path / "p").write_bytes(data)
    sources: list[Any] = [data, tmp_path / "p", Image.open(io.BytesIO(data)), lambda: data, lambda: tmp_path / "p"]
    opened = [open_image(source) for source in sources]
    assert {(image.mode, image.size) for image in opened} == {("RGB", (8, 6))}
    assert len({image.tobytes() for image in opened}) == 1


def test_a_picture_is_measured_before_it_is_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    large = Image.new("1", (8000, MAX_PIXELS // 8000 + 1))
    monkeypatch.setattr(Image.Image, "convert", lambda *_: pytest.fail("it was decoded"))
    with pytest.raises(DataError, match=r"the image in the data: enormous, 8000×"):
        open_image(large)


@pytest.mark.parametrize(
    ("source", "message"),
    [(Path("/home/me/set/gone.png"), r"^set/gone\.png: missing"), (b"GIF89a", "corrupt"), (lambda: 3, "got int")],
)
def test_what_cannot_be_shown_is_named_without_saying_where_files_lie(source: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        open_image(source)


def test_sizes_are_known_of_every_kind_of_source_without_decoding(tmp_path: Path) -> None:
    picture, data = Image.new("RGB", (40, 30)), io.BytesIO()
    picture.save(data, "PNG")
    (tmp_path / "cut.png").write_bytes(data.getvalue()[:45])  # the header, and nothing else
    for source in (picture, data.getvalue(), tmp_path / "cut.png", lambda: tmp_path / "cut.png"):
        assert image_size(source) == (40, 30)
    for gone in (tmp_path / "gone.png", tmp_path, b"no picture"):
        with pytest.raises(DataError):
            image_size(gone)
