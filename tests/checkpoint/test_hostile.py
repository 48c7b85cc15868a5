"""Checkpoints and recipes that lie or attack are refused with the file, the field and the remedy, in little time."""

from __future__ import annotations

import json
import pickle
import resource
from pathlib import Path
from typing import Any

import pytest

from vlmgraft.checkpoint.index import INDEX, MAX_HEADER, open_checkpoint
from vlmgraft.errors import CheckpointError, RecipeError
from vlmgraft.pipeline import read_recipe

F32 = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}


def entry(**changes: Any) -> dict[str, Any]:
    return {**F32, **changes}


def write(folder: Path, header: object, data: bytes = b"1234", name: str = "model.safetensors") -> Path:
    text = header.encode() if isinstance(header, str) else json.dumps(header).encode()
    (folder / name).write_bytes(len(text).to_bytes(8, "little") + text + data)
    return folder / name


def peak() -> int:
    """Bytes; the most this process ever had."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


LIES = {
    "past the end": ({"w": entry(shape=[2], data_offsets=[0, 8])}, "truncated"),
    "far past the end": ({"w": entry(dtype="U8", shape=[1 << 62], data_offsets=[0, 1 << 62])}, "truncated"),
    "begins past the end": ({"w": entry(data_offsets=[1 << 40, (1 << 40) + 4])}, "truncated"),
    "overlap": ({"v": F32, "w": F32}, "inside v"),
    "negative begin": ({"w": entry(data_offsets=[-4, 0])}, "offsets"),
    "backwards": ({"w": entry(data_offsets=[4, 0])}, "spans -4"),
    "negative shape": ({"w": entry(shape=[-1, -1])}, "shape"),
    "float shape": ({"w": entry(shape=[1.0])}, "shape"),
    "boolean shape": ({"w": entry(shape=[True])}, "shape"),
    "text shape": ({"w": entry(shape="1")}, "shape"),
    "float offsets": ({"w": entry(data_offsets=[0.0, 4.0])}, "offsets"),
    "three offsets": ({"w": entry(data_offsets=[0, 4, 4])}, "data_offsets"),
    "shape overflow": ({"w": entry(shape=[1 << 40] * 4)}, "spans 4"),
    "shape that wraps to 4 bytes": ({"w": entry(shape=[(1 << 62) + 1])}, "spans 4"),
    "huge rank": ({"w": entry(shape=[1 << 60] * 100_000)}, "more than a file"),
    "unknown dtype": ({"w": entry(dtype="F4")}, "dtype 'F4'"),
    "dtype of another type": ({"w": entry(dtype=["F32"])}, "dtype"),
    "entry of another type": ({"w": 3}, "no proper"),
    "hole at the end": ({"w": entry(shape=[0], data_offsets=[0, 0])}, "after the last tensor"),
    "twice": ('{"w": %s, "w": %s}' % (json.dumps(F32), json.dumps(F32)), "twice"),  # noqa: UP031
    "deep": ("[" * 100_000, "JSON"),
    "no mapping": ("[]", "mapping"),
    "digits": ('{"w": {"dtype": "F32", "shape": [%s], "data_offsets": [0, 4]}}' % ("9" * 5000), "JSON"),
    "control characters": ({"w\x1b[2Jx": F32}, "name"),
    "line break": ({"w\nERROR": F32}, "name"),
    "lone surrogate": ({"w\ud800": F32}, "name"),
    "no name": ({"": F32}, "name"),
}


@pytest.mark.parametrize("lie", LIES)
def test_headers_that_lie(lie: str, tmp_path: Path) -> None:
    header, said = LIES[lie]
    file = write(tmp_path, header)
    before = peak()
    with pytest.raises(CheckpointError, match=said) as refused:
        open_checkpoint(tmp_path)
    message = str(refused.value)
    assert message.startswith(str(file)) and refused.value.exit_code == 2
    assert len(message) < 1500 and "\x1b" not in message and "\n" not in message
    assert peak() - before < 100_000_000


@pytest.mark.parametrize("claimed", [MAX_HEADER, MAX_HEADER + 1, 1 << 63, (1 << 64) - 1])
def test_a_header_larger_than_its_file_or_than_the_limit_is_not_read(claimed: int, tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    with file.open("wb") as handle:
        handle.write(claimed.to_bytes(8, "little"))
        handle.truncate(MAX_HEADER if claimed == MAX_HEADER else 2 * MAX_HEADER)  # sparse
    before = peak()
    with pytest.raises(CheckpointError, match="header"):
        open_checkpoint(tmp_path)
    assert peak() - before < 10_000_000


@pytest.mark.parametrize(
    "shard", ["../s.safetensors", "/etc/passwd", "a/../s.safetensors", "..", "", "s\\t", "s\x00", 3]
)
def test_an_index_does_not_lead_out_of_its_folder(shard: object, tmp_path: Path) -> None:
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": {"w": shard}}))
    with pytest.raises(CheckpointError, match=INDEX):
        open_checkpoint(tmp_path)


def test_pickles_are_never_opened(tmp_path: Path) -> None:
    class Bomb:
        def __reduce__(self) -> tuple[Any, ...]:
            return (Path.touch, (tmp_path / "ran",))

    for name in ("pytorch_model.bin", "model.safetensors", "model.pt"):
        (tmp_path / name).write_bytes(pickle.dumps(Bomb()))
        with pytest.raises(CheckpointError):
            open_checkpoint(tmp_path)
        assert not (tmp_path / "ran").exists()
        (tmp_path / name).unlink()


@pytest.mark.parametrize(
    "tag", ["!!python/object/apply:os.system [touch RAN]", "!!python/name:os.system", "!include x"]
)
def test_tags_in_recipes_are_refused_and_run_nothing(tag: str, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"vlm: {tag.replace('RAN', str(tmp_path / 'ran'))}\ndonor: b\n")
    with pytest.raises(RecipeError, match=r"recipe\.yaml"):
        read_recipe(recipe)
    assert not (tmp_path / "ran").exists()


def test_recipes_that_grow_or_nest(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    grown = "&a0 [x, x, x, x, x, x, x, x, x]"
    for n in range(1, 10):
        grown = f"&a{n} [{grown}, {', '.join([f'*a{n - 1}'] * 8)}]"
    models = "vlm: a\ndonor: b\ndonor_base: c\n"
    for text in (
        f"{models}method: {{name: {grown}}}",
        f"{models}modules: {grown}",
        "vlm: " + "[" * 5_000 + "]" * 5_000,
    ):
        recipe.write_text(text)
        with pytest.raises(RecipeError, match=r"recipe\.yaml: (more than 16 YAML aliases|nested too deeply)"):
            read_recipe(recipe)


def test_remote_code_is_not_run_by_opening(tmp_path: Path) -> None:
    write(tmp_path, {"w": F32})
    (tmp_path / "config.json").write_text(json.dumps({"auto_map": {"AutoConfig": "evil.Config"}, "model_type": "evil"}))
    (tmp_path / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    assert open_checkpoint(tmp_path).config["model_type"] == "evil"
    assert not (tmp_path / "ran").exists()
