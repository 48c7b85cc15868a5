"""Many tensors, files, images and runs: work grows in step with them, memory and descriptors do not.

`benchmarks/load.py` measures the same at full size; here operations and bytes are counted, never seconds.
"""

from __future__ import annotations

import gc
import json
import os
import resource
import sys
import threading
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

import vlmgraft as vg
from vlmgraft.alignment import Alignment, align
from vlmgraft.checkpoint.handles import Handles
from vlmgraft.checkpoint.index import open_checkpoint
from vlmgraft.checkpoint.verify import verify
from vlmgraft.errors import DataError
from vlmgraft.hf.batches import load_questions
from vlmgraft.merging import merge_tensors, plan_merge
from vlmgraft.methods import METHODS

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
from load import KEYS, make_trio, private

ARITHMETIC = METHODS["task_arithmetic"]


@contextmanager
def counted_calls() -> Iterator[list[int]]:
    """The number of Python functions called inside, in all threads."""
    calls = [0]

    def count(_: Any, event: str, __: Any) -> None:
        if event in ("call", "c_call"):
            calls[0] += 1

    threading.setprofile(count)
    sys.setprofile(count)
    try:
        yield calls
    finally:
        sys.setprofile(None)
        threading.setprofile(None)  # type: ignore[arg-type]


def opened(folder: Path) -> Alignment:
    return align(*(open_checkpoint(folder / key) for key in KEYS))


@pytest.mark.parametrize("fused", [False, True])
def test_work_grows_in_step_with_the_tensors(fused: bool, tmp_path: Path) -> None:
    """Twice and four times the layers of a mixture of experts: twice and four times the calls, planned and merged."""
    counts: dict[str, list[float]] = {"plan": [], "merge": []}
    for layers in (3, 6, 12):
        folder = tmp_path / str(layers)
        tensors = make_trio(folder, layers, 16, fused=fused)
        with counted_calls() as calls:
            alignment = opened(folder)
            plan_merge(alignment, ARITHMETIC())
        counts["plan"].append(calls[0] / tensors)
        with counted_calls() as calls:
            merge_tensors(alignment, ARITHMETIC(), folder / "out", threads=1)
        counts["merge"].append(calls[0] / tensors)
    for what, (few, _, many) in counts.items():
        assert many < 1.1 * few, f"{what}: calls per tensor {counts[what]}"


def test_memory_per_tensor_is_small(tmp_path: Path) -> None:
    """What a merge keeps of a tensor is its row: some kilobytes, whatever is in it."""
    peaks, tensors = [], []
    for layers in (2, 6):
        tensors.append(make_trio(tmp_path / str(layers), layers, 32))
        gc.collect()
        tracemalloc.start()
        merge_tensors(opened(tmp_path / str(layers)), ARITHMETIC(), tmp_path / str(layers) / "out", threads=1)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    grown = (peaks[1] - peaks[0]) / (tensors[1] - tensors[0])
    assert grown < 16_000, f"{grown:.0f} bytes per tensor of three checkpoints and the receipt"


@contextmanager
def descriptors(more: int) -> Iterator[None]:
    """Only so many more files can be opened inside."""
    now = sum(1 for _ in Path("/proc/self/fd").iterdir())
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (now + more, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


def many_files(folder: Path, layers: int, more: int) -> None:
    """Merge and verify checkpoints with one tensor per file, where few files may be open."""
    make_trio(folder, layers, 8, shard_size=1)
    with descriptors(more):
        alignment = opened(folder)
        files = [len(getattr(alignment, key).files) for key in KEYS]
        assert min(files) > 30 * layers
        merge_tensors(alignment, ARITHMETIC(), folder / "out", shard_size=1)
        found = verify(folder / "out")
    assert not found.faults and found.files > files[0]


def test_more_files_than_may_be_open(tmp_path: Path) -> None:
    many_files(tmp_path, 2, 40 + 3 * 32)


@pytest.mark.slow
def test_a_thousand_files_where_256_may_be_open(tmp_path: Path) -> None:
    many_files(tmp_path, 11, 256 - 60)


def test_handles_in_use_stay_open(tmp_path: Path) -> None:
    """Files that threads are reading are kept beyond the limit; idle ones are closed, the oldest first."""
    files = [tmp_path / str(number) for number in range(6)]
    for file in files:
        file.write_text(file.name)
    handles = Handles(os.O_RDONLY, most=2)
    with handles.of(files[0]) as first, handles.of(files[1]), handles.of(files[2]) as third:
        assert os.pread(first, 9, 0) == b"0" and os.pread(third, 9, 0) == b"2"
        for file in files[3:]:
            with handles.of(file) as handle:
                assert os.pread(handle, 9, 0).decode() == file.name
        assert os.pread(first, 9, 0) == b"0"
        assert list(handles._files) == [*files[:3], files[5]]
    with handles.of(files[4]):
        assert list(handles._files) == [files[5], files[4]]
    handles.close()
    with pytest.raises(OSError, match="Bad file"):
        os.pread(first, 9, 0)


@pytest.fixture
def ten_thousand(image_calibration: Path, tmp_path: Path) -> Path:
    """Ten thousand calibration questions, each with a file of its own."""
    rows = []
    for number in range(10_000):
        os.link(_copy(image_calibration.parent / "0.png", tmp_path), tmp_path / f"{number}.png")
        rows.append(json.dumps({"question": f"What is {number}?", "image": f"{number}.png"}))
    (tmp_path / "questions.jsonl").write_text("\n".join(rows))
    return tmp_path / "questions.jsonl"


def _copy(file: Path, folder: Path) -> Path:
    made = folder / "one.png"
    if not made.exists():
        made.write_bytes(file.read_bytes())
    return made


def test_ten_thousand_images(ten_thousand: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each is opened once to be checked, closed again, and not kept; a bad one is named by its line."""
    seen: list[str] = []
    real = os.open

    def count(path: Any, *args: Any, **options: Any) -> int:
        if str(path).endswith(".png"):
            seen.append(str(path))
        return real(path, *args, **options)

    monkeypatch.setattr(os, "open", count)
    load_questions(ten_thousand, need_images=True, limit=8)
    seen.clear()
    gc.collect()
    before = private()
    with descriptors(20):
        asked = load_questions(ten_thousand, need_images=True)
    grew = private() - before
    assert len(asked) == 10_000 and len(seen) <= 10_000
    assert all(isinstance(image, Path) for question in asked for image in question.images)
    assert grew < 10_000 * 4_000, f"{grew / 10_000:.0f} bytes per question"
    bad = ten_thousand.with_name("7776.png")
    bad.unlink()
    bad.write_bytes(b"no picture")
    with pytest.raises(DataError, match=r"line 7777.*7776\.png"):
        load_questions(ten_thousand, need_images=True)


def grown(run: Callable[[int], object], warm: int, times: int) -> dict[str, int]:
    """How private memory, descriptors and threads grew over so many runs, after some to warm up."""
    marks: list[dict[str, int]] = []
    for number in range(warm + times):
        run(number)
        if number + 1 in (warm, warm + times):
            gc.collect()
            opened_now = sum(1 for _ in Path("/proc/self/fd").iterdir())
            marks.append({"bytes": private(), "open": opened_now, "threads": threading.active_count()})
    return {key: marks[1][key] - marks[0][key] for key in marks[0]}


@pytest.mark.slow
def test_two_hundred_merges_leave_nothing(trio: Path, tmp_path: Path) -> None:
    places = {"vlm": str(trio / "vlm"), "donor": str(trio / "donor"), "donor_base": str(trio / "base")}
    names = ("task_arithmetic", "linear")
    made = grown(lambda n: vg.merge(places | {"method": {"name": names[n % 2]}}, tmp_path / str(n)), 10, 190)
    assert made["open"] == 0 and made["threads"] == 0
    assert made["bytes"] < 30e6, made


@pytest.mark.slow
def test_sweeps_leave_nothing(trio: Path, tmp_path: Path) -> None:
    """A dozen sweeps; `benchmarks/load.py` makes a hundred."""
    from vlmgraft.analysis import EvalData

    places = {"vlm": str(trio / "vlm"), "donor": str(trio / "donor"), "donor_base": str(trio / "base")}
    recipe, asked = places | {"method": {"name": "task_arithmetic"}}, EvalData(samples=4)
    made = grown(lambda n: vg.analysis.sweep({"t": recipe}, ["method.scale=0.5"], tmp_path / str(n), asked), 3, 9)
    assert made["open"] == 0 and made["threads"] == 0
    assert made["bytes"] < 40e6, made
