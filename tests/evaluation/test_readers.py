"""Readers: rows of our own in each published layout; files of every kind; bad rows become counted items."""

from __future__ import annotations

import base64
import io
import json
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset, DatasetDict, Features, Image as Picture, Value
from PIL import Image

from vlmgraft.analysis.eval_data import EvalData
from vlmgraft.errors import DataError
from vlmgraft.evaluation.ask import ask
from vlmgraft.evaluation.items import Item, open_image
from vlmgraft.evaluation.presets import PRESETS
from vlmgraft.evaluation.readers import distinct_tasks, load_suite, short_names
from vlmgraft.evaluation.records import load_records
from vlmgraft.evaluation.summary import summarise, summary_table

LAYOUTS: dict[str, list[dict[str, Any]]] = json.loads(Path(__file__).with_name("layouts.json").read_text("utf-8"))
RIGHT = {
    "mathvista": ["4", "B", "0.46"],
    "mathverse": ["B", "The answer is 12 cm."],
    "mathvision": ["(C)", "\\boxed{13}"],
    "wemath": ["B", "C. 16 cm^2", "16 cm²"],
    "logicvista": ["D", "A and C"],
    "mmmu": ["the second", "x = 7"],
    "mmstar": ["D"],
    "dynamath": ["7/2", "5.0"],
    "pope": ["Yes.", "No, there is no boat."],
    "vizwiz": ["A cup", "unanswerable"],
    "textvqa": ["Dakota"],
    "chartqa": ["3", "27"],
    "ocrbench": ["It says centre.", "\\frac{1}{2}"],
    "realworldqa": ["B", "two"],
    "hallusionbench": ["yes", "no"],
}
"""Answers that a careful person counts as right, in words that the layouts do not use."""


def picture(colour: str = "red") -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), colour).save(buffer, "PNG")
    return buffer.getvalue()


def write_layout(name: str, folder: Path) -> Path:
    """The rows as a JSON-lines file, the pictures as files beside it."""
    (folder / "p.png").write_bytes(picture())
    rows = [{key: "p.png" if value == "@" else value for key, value in row.items()} for row in LAYOUTS[name]]
    path = folder / "rows.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")
    return path


@pytest.mark.parametrize("name", PRESETS)
def test_a_layout_is_read_asked_and_scored(name: str, tmp_path: Path, scripted: Any) -> None:
    suite = load_suite(f"{name}:{write_layout(name, tmp_path)}")
    assert len(suite.items) == len(LAYOUTS[name]) and not suite.duplicates
    assert all(item.kind == PRESETS[name].kind and item.answers and not item.fault for item in suite.items)
    assert all(item.images and open_image(item.images[0]).size == (8, 8) for item in suite.items)
    answers = iter(RIGHT[name])
    said = {item.id: next(answers) for item in suite.items}
    order = {item.question: item.id for item in suite.items}

    def right(question: Any) -> str:
        ids = [key for text, key in order.items() if question.question.startswith(text)]
        return said[ids[0]] if len(order) == len(said) else said.pop(next(iter(said)))

    records = ask(scripted(right), suite, batch_size=1)
    found = summarise(records)
    assert found.tasks[0].score is not None and found.tasks[0].score.mean == pytest.approx(
        1, abs=0.51 * (name == "vizwiz")
    )
    wrong = summarise(ask(scripted(lambda question: "99 violets"), suite))
    chance = 0.5 if name == "pope" else 0  # POPE counts every answer without "no" as a yes
    assert wrong.tasks[0].score is not None and wrong.tasks[0].score.mean == chance


@pytest.mark.parametrize("name", PRESETS)
def test_a_layout_is_the_same_in_parquet(name: str, tmp_path: Path) -> None:
    """As the hub keeps them: pictures as bytes inside the file."""
    plain = load_suite(f"{name}:{write_layout(name, tmp_path)}")
    rows = LAYOUTS[name]
    columns = {key: [row.get(key) for row in rows] for key in dict.fromkeys(key for row in rows for key in row)}
    pictured = [key for key, values in columns.items() if "@" in values]
    for key in pictured:
        columns[key] = [{"bytes": picture(), "path": None} if value == "@" else None for value in columns[key]]
    if name in ("vizwiz", "logicvista", "chartqa"):  # rows of two releases, which no one file holds together
        columns = {key: values[:1] for key, values in columns.items() if values[0] is not None}
    data = Dataset.from_dict(columns)
    for key in set(pictured) & set(columns):
        data = data.cast_column(key, Picture())
    data.to_parquet(tmp_path / "rows.parquet")
    stored = load_suite(f"{name}:{tmp_path / 'rows.parquet'}")
    for item, other in zip(stored.items, plain.items, strict=False):
        assert (item.question, item.answers, item.choices, item.id) == (
            other.question,
            other.answers,
            other.choices,
            other.id,
        )
        assert len(item.images) == len(other.images) and open_image(item.images[0]).size == (8, 8)


def test_choices_groups_and_precision_of_the_layouts(tmp_path: Path) -> None:
    def items(name: str) -> tuple[Item, ...]:
        return load_suite(f"{name}:{write_layout(name, tmp_path)}").items

    assert items("wemath")[0].choices == ("3 cm", "4 cm", "5 cm", "No correct answer")
    assert {item.group for item in items("wemath")} == {"w1"} and items("wemath")[2].part == "2steps_multi"
    assert items("mathvista")[2].precision == 1 and items("mathvista")[0].choices == ()
    assert len(items("mmmu")[0].images) == 2 and items("mmmu")[0].choices == ("the first", "the second", "neither")
    assert items("mmmu")[1].choices == ()
    assert [item.id for item in items("dynamath")] == ["1/sample_variant1", "1/sample_variant2"]
    figures = [item.group for item in items("hallusionbench")]
    assert figures == ["VD/illusion/0/0|VD/illusion/0/0", "VD/illusion/0/0|VD/illusion/0/1"]
    assert items("vizwiz")[1].answers == ("unanswerable", "red")


ROWS = [
    {"question": "one?", "answer": 1},
    {"question": "two?", "answer": None},
    {"question": ""},
    {"answer": "x"},
    {"question": 5, "answer": "x"},
    {"question": "lost picture?", "image": "gone.png", "answer": "x"},
    {"question": "odd picture?", "image": 7, "answer": "x"},
    {"question": "twice?", "id": "a", "answer": "x"},
    {"question": "twice again?", "id": "a", "answer": "x"},
    {
        "question": "which?",
        "choices": ["x", "y"],
        "answer": "B",
        "kind": "perception",
        "task": "picks",
        "metric": "auto",
    },
]


def test_bad_rows_are_kept_counted_and_shown(tmp_path: Path, scripted: Any) -> None:
    path = tmp_path / "mine.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in ROWS))
    suite = load_suite(path)
    assert suite.duplicates == 1 and [item.id for item in suite.items][7:9] == ["a", "a#2"]
    found = summarise(ask(scripted(lambda question: "x"), suite), duplicates=suite.duplicates)
    assert (found.counts.items, found.counts.scored, found.counts.unscored, found.counts.not_asked) == (10, 4, 1, 5)
    assert {fault.split(":")[0] for fault in found.faults} >= {"the question is empty", "no picture"}
    assert [task.task for task in found.tasks] == ["mine", "picks"]


def test_every_kind_of_file_holds_the_same_rows(tmp_path: Path) -> None:
    rows = [{"question": f"q{n}?", "answer": str(n), "image": "p.png"} for n in range(3)]
    (tmp_path / "p.png").write_bytes(picture())
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n\n")
    (tmp_path / "b.json").write_text(json.dumps(rows))
    (tmp_path / "c.json").write_text(json.dumps({str(n): row for n, row in enumerate(rows)}))
    Dataset.from_list(rows).to_parquet(tmp_path / "d.parquet")
    data = Dataset.from_list([{**row, "image": {"bytes": picture(), "path": None}} for row in rows])
    data = data.cast(Features({"question": Value("string"), "answer": Value("string"), "image": Picture()}))
    DatasetDict({"test": data, "other": data.select([0])}).save_to_disk(tmp_path / "saved")
    (tmp_path / "parts").mkdir()
    data.select([0, 1]).to_parquet(tmp_path / "parts" / "test-0.parquet")
    data.select([2]).to_parquet(tmp_path / "parts" / "test-1.parquet")
    for name in ("a.jsonl", "b.json", "c.json", "d.parquet", "parts", "saved"):
        suite = load_suite(tmp_path / name, split="test" if name == "saved" else None)
        assert [(item.question, item.answers) for item in suite.items] == [(f"q{n}?", (str(n),)) for n in range(3)], (
            name
        )
        assert all(open_image(item.images[0]).size == (8, 8) for item in suite.items), name


def test_a_column_map_names_other_columns(tmp_path: Path) -> None:
    (tmp_path / "p.png").write_bytes(picture())
    row = {"frage": "was?", "loesung": "rot", "bild": "p.png", "satz": 3, "teil": "b"}
    (tmp_path / "q.jsonl").write_text(json.dumps(row))
    columns = {"question": "frage", "answers": "loesung", "images": "bild", "id": "satz+teil"}
    (item,) = load_suite(tmp_path / "q.jsonl", columns=columns).items
    assert (item.question, item.answers, item.id) == ("was?", ("rot",), "3/b") and len(item.images) == 1


def test_pictures_as_base64_are_read(tmp_path: Path) -> None:
    row = {"question": "q?", "image": base64.b64encode(picture()).decode()}
    (tmp_path / "q.jsonl").write_text(json.dumps(row))
    assert open_image(load_suite(tmp_path / "q.jsonl").items[0].images[0]).size == (8, 8)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("none.jsonl", None, "no such file"),
        ("x.jsonl", "{", "line 1: not JSON"),
        ("x.jsonl", "[1]", "line 1: must be a JSON object"),
        ("x.json", "3", "list of objects"),
        ("x.jsonl", "\n", "holds no row"),
        ("x.jsonl", '{"frage": 1}', "no column question; it has frage.*--column question=query"),
        ("x.parquet", "no parquet", "no parquet file"),
        ("x.csv", "a,b", "cannot be read; give .jsonl"),
    ],
)
def test_sources_that_cannot_be_read_are_named(tmp_path: Path, name: str, text: str | None, message: str) -> None:
    if text is not None:
        (tmp_path / name).write_text(text)
    with pytest.raises(DataError, match=message):
        load_suite(tmp_path / name)


def test_a_folder_of_a_presets_or_a_sources_name_is_not_passed_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    rows = [{"question": "Is there a cat?", "answer": "yes", "category": "c", "question_id": str(n)} for n in range(3)]
    for name in ("pope", "lab"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "notes.txt").touch()
    assert len(load_suite("lab", limit=4).items) == 4, "a folder without data is nobody's question file"
    for name in ("pope", "lab"):
        Dataset.from_list(rows).to_parquet(tmp_path / name / "test.parquet")
        with pytest.raises(DataError, match=rf"^{name}: is .*write \./{name} for the folder.*{name}: for the other"):
            load_suite(name)
        assert len(load_suite(f"./{name}").items) == 3
    assert [item.metric for item in load_suite("pope:pope").items] == ["pope"] * 3
    assert len(load_suite("lab:", limit=4).items) == 4


def test_unknown_fields_of_a_column_map_and_missing_splits_are_named(tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_text('{"question": "q"}')
    with pytest.raises(DataError, match=r"unknown field 'picture'; it has question, images"):
        load_suite(tmp_path / "x.jsonl", columns={"picture": "p"})
    data = Dataset.from_list([{"question": "q"}])
    DatasetDict({"a": data, "b": data}).save_to_disk(tmp_path / "saved")
    with pytest.raises(DataError, match="splits a, b; name one"):
        load_suite(tmp_path / "saved")


def test_all_splits_are_read_as_variants(tmp_path: Path) -> None:
    rows = [{key: value for key, value in LAYOUTS["dynamath"][0].items() if key not in ("decoded_image", "variant")}]
    parts = {f"sample_variant{n}": Dataset.from_list(rows) for n in (1, 2, 3)}
    DatasetDict(parts).save_to_disk(tmp_path / "dynamath")
    suite = load_suite(f"dynamath:{tmp_path / 'dynamath'}", split="all")
    assert [item.id for item in suite.items] == [f"1/sample_variant{n}" for n in (1, 2, 3)]
    assert {item.group for item in suite.items} == {"1"}


def test_turned_options_are_right_together_only(tmp_path: Path, scripted: Any) -> None:
    rows = [{"question": f"{n}?", "choices": ["red", "blue", "green"], "answer": "B"} for n in "pq"]
    (tmp_path / "q.jsonl").write_text("\n".join(map(json.dumps, rows)))
    suite = load_suite(tmp_path / "q.jsonl", turn_options=True)
    assert len(suite.items) == 6 and [item.answers[0] for item in suite.items[:3]] == ["B", "A", "C"]
    knows = summarise(ask(scripted(lambda question: "blue"), suite)).tasks[0]
    guesses = summarise(ask(scripted(lambda question: "B"), suite)).tasks[0]
    assert knows.score is not None and knows.score.mean == 1 and knows.measure == "all rotations right"
    assert guesses.score is not None and guesses.score.mean == 0
    assert guesses.others["item accuracy"] == pytest.approx(1 / 3)


@pytest.mark.parametrize(
    ("choices", "answer", "right"),
    [
        (["x", "y"], 1, "B"),  # a place, as ScienceQA and AI2D give it
        (["1", "0"], 1, "A"),  # a choice's own text comes first
        ({"A": "x", "B": "y"}, "y", "B"),
        ("['x', 'y']", "B", "y"),
        (["x", "y"], "z", "z"),  # none of the choices: whoever says it all the same is right
        (None, "['7', 'seven']", "seven"),
        (None, "[1, 2]", "1, 2"),
    ],
)
def test_answers_in_many_forms(tmp_path: Path, scripted: Any, choices: Any, answer: Any, right: str) -> None:
    (tmp_path / "q.jsonl").write_text(json.dumps({"question": "q?", "choices": choices, "answer": answer}))
    suite = load_suite(tmp_path / "q.jsonl")
    assert ask(scripted(lambda question: right), suite)[0].score == 1
    assert ask(scripted(lambda question: "C or 5"), suite)[0].score == 0


def one(folder: Path, *rows: dict[str, Any], **options: Any) -> Item:
    (folder / "p.png").write_bytes(picture())
    (folder / "q.jsonl").write_text("\n".join(json.dumps({"question": "q?", **row}) for row in rows))
    return load_suite(folder / "q.jsonl", **options).items[0]


@pytest.mark.parametrize(
    ("row", "answers", "kind"),
    [
        ({"choices": {"text": ["red", "blue"], "label": ["1", "2"]}, "answer": "2"}, ("B",), "other"),
        ({"choices": ["red", "blue"], "answer": 1.0}, ("B",), "other"),
        ({"choices": ["red", "blue"], "answer": [1]}, ("B",), "other"),
        ({"choices": ["red", "blue", "x"], "answer": [0, 2]}, ("A", "C"), "other"),
        ({"choices": ["A. red", "B. blue"], "answer": "B. blue"}, ("B",), "other"),
        ({"answer": float("nan")}, (), "other"),
        ({"answer": [float("nan"), 2.0]}, ("2",), "other"),
        ({"answers": {"text": ["red", "crimson"], "answer_start": [1, 2]}}, ("red", "crimson"), "other"),  # SQuAD
        ({"answer": {"value": "red", "aliases": ["crimson"]}}, ("red", "crimson"), "other"),  # TriviaQA
        ({"answer": "x", "kind": "Reasoning"}, ("x",), "reasoning"),
        ({"answer": "x", "kind": float("nan"), "id": float("nan")}, ("x",), "other"),
    ],
)
def test_answers_and_kinds_of_common_layouts(tmp_path: Path, row: Any, answers: tuple[str, ...], kind: str) -> None:
    item = one(tmp_path, row)
    assert (item.answers, item.kind, item.id, item.fault) == (answers, kind, "0", "")


@pytest.mark.parametrize(
    ("row", "fault"),
    [
        ({"options": "red, blue", "answer": "B"}, "column \"options\": 'red, blue' is neither a list"),
        ({"choices": ["red"], "answer": "A"}, 'column "choices": only one choice'),
        ({"choices": ["red", "blue"], "answer": -1}, "answer '-1' is none of the 2 choices"),
        ({"answer": {"score": 1}}, "an answer is no text"),
        ({"answer": [["red"]]}, "an answer is no text"),
        ({"kind": "maths"}, "kind 'maths' is none of reasoning, perception, other"),
        ({"question": "what is <image> ?"}, "1 places for images, but 0 images"),
        ({"question": "<image> or <image> ?", "image": "p.png"}, "2 places for images, but 1 images"),
        ({"image": "https://x.org/r.png"}, "images are not read from URLs: https://x.org/r.png; download it"),
        ({"image": "file:///tmp/r.png"}, "not read from URLs: file:///tmp/r.png"),
        ({"image": "data:image/png;base64,AAAA"}, "not read from URLs: data:image/png"),
    ],
)
def test_what_would_be_asked_otherwise_is_a_fault(tmp_path: Path, row: Any, fault: str) -> None:
    assert fault in one(tmp_path, row).fault


def test_a_choice_without_text_keeps_its_letter(tmp_path: Path, scripted: Any) -> None:
    one(tmp_path, {"choices": {"A": "red", "B": None, "C": "green", "D": "x"}, "answer": "C"})
    suite = load_suite(tmp_path / "q.jsonl")
    (record,) = ask(scripted(lambda question: "green"), suite)
    assert record.score == 1 and record.prompt == "q?\nA. red\nC. green\nD. x"


def test_choices_in_parquet_structs(tmp_path: Path) -> None:
    """pyarrow gives every row all fields, and pandas writes integers beside missing values as floats."""
    rows = {
        "question": ["q0", "q1"],
        "choices": [[{"label": "B", "text": "y"}, {"label": "A", "text": "x"}]] * 2,
        "answer": [1.0, None],
    }
    Dataset.from_dict(rows).to_parquet(tmp_path / "q.parquet")
    items = load_suite(tmp_path / "q.parquet").items
    assert [(item.choices, item.answers) for item in items] == [(("x", "y"), ("B",)), (("x", "y"), ())]


def test_answers_that_count_from_one_are_refused(tmp_path: Path) -> None:
    choices = {"choices": ["red", "blue"]}
    with pytest.raises(DataError, match=r"q\.jsonl: the answers number the choices from 1"):
        one(tmp_path, {**choices, "answer": 1}, {**choices, "answer": 2})


def test_fields_have_the_names_of_calibration_columns_too(tmp_path: Path) -> None:
    row = {"bild": "p.png", "loesung": "rot", "set": "mine"}
    item = one(tmp_path, row, columns={"image": "bild", "answer": "loesung", "task": "set"})
    assert (len(item.images), item.answers, item.task) == (1, ("rot",), "mine")
    with pytest.raises(DataError, match="names twice 'images'"):
        one(tmp_path, row, columns={"image": "bild", "images": "bild"})


def test_texts_that_no_file_can_hold_and_line_ends_inside_texts_survive(tmp_path: Path, scripted: Any) -> None:
    row = {
        "question": "half \ud800 a pair?",
        "answer": "\ud800",
        "id": "\udfff",
        "choices": ["\ud800", "b"],
        "task": "a\nb|c",
    }
    (tmp_path / "q.jsonl").write_text(json.dumps(row))
    records = ask(
        scripted(lambda question: "a\u2028b\x85c\n\nd"), load_suite(tmp_path / "q.jsonl"), log=tmp_path / "r.jsonl"
    )
    assert sorted(load_records(tmp_path / "r.jsonl"), key=lambda record: record.id) == sorted(
        records, key=lambda record: record.id
    )
    assert records[0].output == "a\u2028b\x85c\n\nd"
    assert summary_table(summarise(records)).splitlines()[2].startswith("| a b/c | other |")


def test_several_pictures_in_one_column_and_rows_picked_out_of_order(tmp_path: Path) -> None:
    colours = [["red", "blue"], [], ["green"]]
    rows = [
        {"question": f"q{n}?", "images": [{"bytes": picture(name), "path": None} for name in names]}
        for n, names in enumerate(colours)
    ]
    features = Features({"question": Value("string"), "images": [Picture()]})
    Dataset.from_list(rows, features=features).to_parquet(tmp_path / "q.parquet")
    Dataset.from_list(rows, features=features).select([2, 0]).save_to_disk(tmp_path / "saved")

    def shown(source: Path) -> list[list[tuple[int, ...]]]:
        items = load_suite(source).items
        return [[open_image(image).getpixel((0, 0)) for image in item.images] for item in items]  # type: ignore[misc]

    red, blue, green = (255, 0, 0), (0, 0, 255), (0, 128, 0)
    assert shown(tmp_path / "q.parquet") == [[red, blue], [], [green]]
    assert shown(tmp_path / "saved") == [[green], [red, blue]]


def test_files_of_one_stem_are_tasks_of_their_own() -> None:
    sources = ["q.jsonl", "a/test.jsonl", "b/test.jsonl", "b/test.parquet", "x/rows.json", "pope", "lab"]
    copies = ["pope:/1/x/rows.jsonl", "pope:/2/x/rows.jsonl"]
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(Path, "exists", lambda path: bool(path.suffix))
        assert distinct_tasks(sources) == ["", "a/test.jsonl", "b/test.jsonl", "b/test.parquet", "", "", ""]
        assert distinct_tasks(sources[:3]) == ["", "a/test", "b/test"]
        assert distinct_tasks(["a/test.jsonl", "a/test.jsonl"]) == ["", ""]
    assert distinct_tasks(copies) == ["pope:1/x/rows", "pope:2/x/rows"]
    assert short_names([Path("/home/me/a/m"), Path("/home/me/b/m")]) == ["a/m", "b/m"]


def test_the_kinds_of_two_files_of_one_stem_stay_apart(tmp_path: Path) -> None:
    files = []
    for folder, kind in (("a", "reasoning"), ("b", "perception")):
        (tmp_path / folder).mkdir()
        files.append(tmp_path / folder / "test.jsonl")
        files[-1].write_text(json.dumps({"question": "why?", "answer": "7", "kind": kind}))
    suite = EvalData(tuple(map(str, files))).evaluator(None).suite
    assert [(item.task, item.kind) for item in suite.items] == [("a/test", "reasoning"), ("b/test", "perception")]
