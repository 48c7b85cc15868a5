"""Question files: read line by line, checked, held."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from vlmgraft.data.questions import (
    Question,
    hold_images,
    load_questions,
    open_images,
    questions_digest,
)
from vlmgraft.data.traces import load_traces
from vlmgraft.errors import DataError


def write(folder: Path, *rows: Any) -> Path:
    path = folder / "q.jsonl"
    path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows), encoding="utf-8")
    return path


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    Image.new("RGB", (20, 10), "red").save(tmp_path / "p.png")
    return tmp_path / "p.png"


def test_a_line_becomes_a_question(tmp_path: Path, picture: Path) -> None:
    path = write(tmp_path, {"question": "Which?", "image": "p.png", "choices": ["red", 2], "answer": 3, "other": 1}, "")
    (question,) = load_questions(path)
    assert question == Question("Which?", (picture,), "3", ("red", "2"), None)
    assert question.prompt == "Which?\nA. red\nB. 2" and question.name == f"{path}, line 1"
    assert Question("x" * 99).name == f"question {'x' * 60!r}"


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("{", "line 2: not JSON"),
        ("[1]", "line 2: must be a JSON object"),
        ({"q": 1}, 'line 2: needs a "question"'),
        ({"question": " "}, 'line 2: needs a "question"'),
        ({"question": "a", "image": 5}, "line 2: an image must be a path"),
        ({"question": "a", "image": "gone.png"}, r"line 2: image .*gone\.png: missing"),
        ({"question": "a", "choices": list(range(27))}, 'line 2: "choices": 27 choices; at most 26'),
        ({"question": "a", "options": "red, blue"}, 'line 2: "options": .* is neither a list'),
        ({"question": "what is <image> ?"}, "line 2: 1 places for images, but 0 images"),
        ({"question": "a", "image": "https://x.org/r.png"}, "line 2: images are not read from URLs: https://x.org/r"),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, row: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        load_questions(write(tmp_path, {"question": "good"}, row))


def test_a_file_without_questions_or_images_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such question file"):
        load_questions(tmp_path / "none.jsonl")
    with pytest.raises(DataError, match="holds no question"):
        load_questions(write(tmp_path, ""))
    with pytest.raises(DataError, match="must show images"):
        load_questions(write(tmp_path, {"question": "a"}), need_images=True)


def test_a_limit_leaves_later_lines_unread(tmp_path: Path) -> None:
    path = write(tmp_path, {"question": "a"}, {"question": "b"}, "{")
    assert [question.question for question in load_questions(path, limit=2)] == ["a", "b"]


def test_held_images_are_those_that_were_checked(picture: Path) -> None:
    question = Question("a", (picture, Image.new("RGB", (3, 3))), max_pixels=50)
    held, beyond = hold_images([question])[0], hold_images([question], budget=0)[0]
    assert held == beyond and held.pixels == 50 + 9 and question.pixels == 9
    assert questions_digest([held]) == questions_digest([question]) != questions_digest([Question("a", (picture,))])
    Image.new("RGB", (20, 10), "blue").save(picture)
    shown = open_images(held)[0]
    assert shown.width * shown.height <= 50 and shown.getpixel((0, 0)) == (255, 0, 0)
    with pytest.raises(DataError, match=r"p\.png: changed while it was in use"):
        open_images(beyond)


SOURCES = ("q.json", "q.parquet", "saved")


def kept(folder: Path, rows: list[dict[str, Any]], name: str) -> Path:
    """The rows in one of the forms that data sets are released in; pictures inside but for JSON."""
    from datasets import Dataset

    if name.endswith(".json"):
        (folder / name).write_text(json.dumps(rows))
        return folder / name
    inside = [{**row, "image": Image.open(folder / row["image"])} for row in rows]
    data = Dataset.from_list(inside)
    data.to_parquet(str(folder / name)) if name.endswith(".parquet") else data.save_to_disk(str(folder / name))
    return folder / name


@pytest.mark.parametrize("name", SOURCES)
def test_questions_come_from_any_source(tmp_path: Path, picture: Path, name: str) -> None:
    """As from JSON lines: the same prompts, pixels and digest; a limit counts rows."""
    rows = [{"question": f"{word}?", "image": "p.png", "other": 1} for word in ("a", "b", "c")]
    expected = load_questions(write(tmp_path, *rows), limit=2)
    source = kept(tmp_path, rows, name)
    found = load_questions(source, need_images=True, limit=2)
    assert [question.prompt for question in found] == ["a?", "b?"]
    assert found[1].name == f"{source}, row 2"
    seen = [open_images(question)[0] for question in (*found, *hold_images(found))]
    assert all(image.tobytes() == open_images(expected[0])[0].tobytes() for image in seen)
    held = hold_images(found)
    assert held[0].pixels == 200 and questions_digest(held) == questions_digest(found)
    assert questions_digest(found) == questions_digest(expected)


def test_a_registered_source_gives_its_calibration_questions() -> None:
    questions = load_questions("lab", need_images=True, limit=3)
    assert len(questions) == 3 and all(question.images for question in questions)


def test_the_first_turn_of_a_chat_is_asked(tmp_path: Path, picture: Path) -> None:
    """As LLaVA's and TRL's files have it; a picture in front of the text needs no place."""
    llava = [{"from": "human", "value": "<image>\nWhat is it?"}, {"from": "gpt", "value": "Red."}]
    trl = [
        {"role": "system", "content": "s"},
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Which?"}]},
    ]
    path = tmp_path / "q.json"
    path.write_text(json.dumps([{"image": "p.png", "conversations": llava}, {"images": ["p.png"], "messages": trl}]))
    assert [(question.prompt, question.images) for question in load_questions(path)] == [
        ("What is it?", (picture,)),
        ("Which?", (picture,)),
    ]
    first, later = (
        {"from": "human", "value": text} for text in ("<image>\nFirst <image> or second?", "<image> Third?")
    )
    several = [first, *llava[1:], later]
    path.write_text(json.dumps([{"image": ["p.png"] * 3, "conversations": several}]))
    (question,) = load_questions(path)
    assert len(question.images) == 2, "the third is shown later"
    path.write_text(json.dumps([{"image": ["p.png"] * 2, "conversations": [first, *llava[1:]]}]))
    assert question.parts == load_traces(path).traces[0].prompt[0]["content"], "as it is learned"
    assert [part.get("text") for part in question.parts] == [None, "First ", None, " or second?"]
    path.write_text(json.dumps([{"conversations": llava[1:]}]))
    with pytest.raises(DataError, match="row 1: has no user turn"):
        load_questions(path)


@pytest.mark.parametrize(
    ("image", "message"),
    [(b"no picture", r"row 1, its image: cannot be read"), (b"", "row 1: the data holds no picture")],
)
def test_a_bad_picture_inside_of_a_data_set_is_named(tmp_path: Path, image: bytes, message: str) -> None:
    from datasets import Dataset, Features, Image as Picture, Value

    features = Features({"question": Value("string"), "image": Picture()})
    rows = {"question": ["a"], "image": [{"bytes": image, "path": None}]}
    Dataset.from_dict(rows, features=features).to_parquet(str(tmp_path / "q.parquet"))
    with pytest.raises(DataError, match=message):
        load_questions(tmp_path / "q.parquet")


@pytest.mark.parametrize(
    ("text", "images", "expected"),
    [
        ("<image>\nWhat?", 1, ["image", "What?"]),
        ("What is <image>, and <image>?", 2, ["What is ", "image", ", and ", "image", "?"]),
        ("Which?\n<image>", 1, ["Which?\n", "image"]),
        ("What is <image> here?", 2, ["image", "image", "What is <image> here?"]),  # one place for two: all in front
        ("What does <image> mean?", 0, ["What does <image> mean?"]),
        ("Plain?", 2, ["image", "image", "Plain?"]),
        ("<image>\n    def f(): ...", 1, ["image", "    def f(): ..."]),
        ("<image> What?", 1, ["image", "What?"]),
    ],
)
def test_images_stand_where_the_text_says(text: str, images: int, expected: list[str]) -> None:
    parts = Question(text, (Path("p.png"),) * images).parts
    assert [part.get("text", part["type"]) for part in parts] == expected


def test_places_are_as_many_as_images(tmp_path: Path, picture: Path) -> None:
    with pytest.raises(DataError, match="line 1: 2 places for images, but 1 images"):
        load_questions(write(tmp_path, {"question": "<image> or <image>?", "image": "p.png"}))


def test_columns_of_other_names_are_mapped(tmp_path: Path, picture: Path) -> None:
    path = write(tmp_path, {"question": "short", "query": "Long?", "decoded": "p.png"})
    (question,) = load_questions(path, columns={"question": "query", "image": "decoded"})
    assert (question.question, question.images) == ("Long?", (picture,))
    Image.new("RGB", (3, 3)).save(tmp_path / "other.png")
    path = write(tmp_path, {"question": "a", "image": "other.png", "photo": "p.png", "messages": [{"role": "user"}]})
    (question,) = load_questions(path, columns={"images": "photo"})
    assert question.images == (picture,), "the column that was not named gives way"
    assert load_questions(path, columns={"images": "none"})[0].images == ()
    with pytest.raises(DataError, match=r"column 'foto' \(for image\) is in no row; there are image, messages, photo"):
        load_questions(path, columns={"image": "foto"})
    with pytest.raises(DataError, match=r"columns: unknown column 'picture'; it is one of question, image"):
        load_questions(path, columns={"picture": "decoded"})


def test_a_question_about_a_video_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match='line 1: column "video" is not shown'):
        load_questions(write(tmp_path, {"question": "What happens?", "video": "a.mp4"}))


def test_choices_are_shown_as_evaluate_shows_them(tmp_path: Path) -> None:
    rows = [{"choices": {"B": "blue", "A": "red"}}, {"options": [{"label": "A", "text": "red"}, ["x"]][:1]}]
    first, second = load_questions(write(tmp_path, *({"question": "which?", **row} for row in rows)))
    assert (first.prompt, second.prompt) == ("which?\nA. red\nB. blue", "which?\nA. red")


def test_base64_is_a_picture(tmp_path: Path, picture: Path) -> None:
    """As tab-separated benchmarks carry them."""
    text = base64.b64encode(picture.read_bytes()).decode()
    path = write(tmp_path, *({"question": "a", "image": each} for each in (text, f"data:image/png;base64,{text}")))
    for question in hold_images(load_questions(path)):
        assert open_images(question)[0].getpixel((0, 0)) == (255, 0, 0)


def test_an_empty_column_hides_no_other(tmp_path: Path, picture: Path) -> None:
    """Parquet and data sets have both columns in every row."""
    path = write(tmp_path, {"question": "a", "image": None, "images": ["p.png"]}, {"question": "b", "image": ""})
    assert [question.images for question in load_questions(path)] == [(picture,), ()]


def test_sources_that_are_not_there_are_named(tmp_path: Path) -> None:
    for name in ("none.json", "none.parquet"):
        with pytest.raises(DataError, match=rf"{name}: no such file"):
            load_questions(tmp_path / name)
