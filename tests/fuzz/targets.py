"""What is fuzzed: bytes in, nothing out, an exception where a promise does not hold.

header, index, recipe: what is wrong is refused by a `VlmgraftError` that names the file in one printable line; what is
accepted keeps its word (the safetensors library reads the same tensors; all files lie in the folder; the recipe written
and read again is the same). answers: nothing is raised, and asking twice gives the same.

The first byte chooses how the others are read, so that the fuzzer reaches deep parts without having to guess lengths.
"""

from __future__ import annotations

import atexit
import json
import shutil
import signal
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path

from safetensors import safe_open

from vlmgraft.checkpoint.header import read_header
from vlmgraft.checkpoint.index import INDEX, open_checkpoint
from vlmgraft.errors import VlmgraftError
from vlmgraft.evaluation import algebra
from vlmgraft.evaluation.answers import final_answer, judge, repeats
from vlmgraft.evaluation.metrics import METRICS, Expected
from vlmgraft.evaluation.text import key, plain, storable, unwrap
from vlmgraft.recipe import dump_recipe, load_recipe
from vlmgraft.recipe.tune import dump_tune_recipe, load_tune_recipe

LONGEST_MESSAGE = 2_000
SECONDS = 5
"""Processor time of one case, in this process; a loaded machine does not change it."""
algebra.SECONDS = 2  # processor time of one comparison; a user's is 10

ENTRY = b'{"%s":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}'


@cache
def folder() -> Path:
    """A folder of this process, in memory where there is such a place."""
    place = Path("/dev/shm") if Path("/dev/shm").is_dir() else None
    made = Path(tempfile.mkdtemp(prefix="vlmgraft-fuzz-", dir=place))
    atexit.register(shutil.rmtree, made, ignore_errors=True)
    for number in (1, 2):
        text = ENTRY % (b"w%d" % number)
        (made / f"s{number}.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + b"1234")
    return made


def refused(error: VlmgraftError, file: str) -> None:
    """The message of a refusal: one printable line of bearable length that names the file, exit code 2."""
    message = str(error)
    assert error.exit_code == 2, error
    assert message.isprintable() and file in message, repr(message)
    assert len(message) <= LONGEST_MESSAGE, f"{len(message)} characters: {message[:300]}"


def header(data: bytes) -> None:
    """A safetensors file: as it is; a header text whose length is right before eight bytes of data; or a header made
    of tensors that nearly follow each other."""
    file = folder() / "model.safetensors"
    kind, data = data[:1], data[1:]
    if kind >= b"\x40":
        text, size = (data, 8) if kind >= b"\x80" else _nearly(data)
        data = len(text).to_bytes(8, "little") + text + bytes(size)
    file.write_bytes(data)
    try:
        tensors = read_header(file)
    except VlmgraftError as error:
        refused(error, file.name)
        return
    with safe_open(file, framework="numpy") as theirs:  # raises where the library would refuse
        assert set(theirs.keys()) == set(tensors)
        for name, info in tensors.items():
            assert list(info.shape) == theirs.get_slice(name).get_shape()
            assert info.begin + info.nbytes <= len(data)


SIZES = {"F32": 4, "BF16": 2, "U8": 1, "F64": 8, "F8_E5M2": 1, "BOOL": 1, "C64": 8, "F4": 1}
NUMBERS: tuple[object, ...] = (1, 2, 3, 0, 1, 2, -1, 1 << 62, (1 << 64) + 1, 1.0, True, "1", None, [1])


def _nearly(data: bytes) -> tuple[bytes, int]:
    """A header of tensors in a row, six bytes each: name, dtype, two numbers of the shape, two shifts of the offsets
    (none below 200); and how many bytes of data a true header would have."""
    entries, at = [], 0
    for name, dtype, *numbers, first, second in zip(*[iter(data[:120])] * 6, strict=False):
        shape = [NUMBERS[number % len(NUMBERS)] for number in numbers if number < 200]
        kind = list(SIZES)[dtype % len(SIZES)]
        nbytes = SIZES[kind]
        for number in shape:
            nbytes *= number if type(number) is int and 0 <= number < 4 else 1
        begin, end = at + max(0, first - 200), at + nbytes + max(0, second - 200)
        entries.append(
            f'"w{name % 32}":{{"dtype":"{kind}","shape":{json.dumps(shape)},"data_offsets":[{begin},{end}]}}'
        )
        at += nbytes
    return f"{{{','.join(entries)}}}".encode(), at


def index(data: bytes) -> None:
    """An index file beside two good shards, or a config.json beside a good index."""
    place = folder()
    (place / "model.safetensors").unlink(missing_ok=True)
    good = json.dumps({"weight_map": {"w1": "s1.safetensors", "w2": "s2.safetensors"}}).encode()
    as_config = data[:1] >= b"\x80"
    (place / INDEX).write_bytes(good if as_config else data[1:])
    (place / "config.json").write_bytes(data[1:] if as_config else b"{}")
    try:
        found = open_checkpoint(place)
    except VlmgraftError as error:
        refused(error, str(place))
        return
    assert all(file.parent == place and file.is_file() for file in found.files)
    assert set(found.tensors) <= {"w1", "w2"}


def recipe(data: bytes) -> None:
    """A recipe file of `merge`, or of `tune`; mergekit's format is among the first."""
    file = folder() / "recipe.yaml"
    file.write_bytes(data[1:])
    tune = data[:1] >= b"\x80"
    try:
        if tune:
            first = dump_tune_recipe(load_tune_recipe(file))
            again = dump_tune_recipe(load_tune_recipe(first))
        else:
            first = dump_recipe(load_recipe(file, need_method=False))
            again = dump_recipe(load_recipe(first, need_method=False))
    except VlmgraftError as error:
        refused(error, file.name)
        return
    assert repr(first) == repr(again)  # repr: NaN is not itself


_compare = algebra.compare


def answers(data: bytes) -> None:
    """What a model says (perhaps one piece over and over) against an expected answer and choices; math-verify is asked
    by a quarter of the first bytes only, since each question takes it a thousand times as long."""
    algebra.compare = _compare if data[:1] and data[0] % 4 == 1 else lambda said, expected: algebra.Comparison(None)
    text = data[1:].decode("utf-8", "surrogateescape" if data[:1] > b"\xf0" else "replace")
    said, _, rest = text.partition("\x1e")
    expected, *choices = rest.split("\x1f")
    if data[:1] >= b"\x80":
        before, _, said = said.partition("\x1d")
        said = before + said * (5_000 // max(1, len(said)))
    first = _asked(said, expected, choices)
    assert first == _asked(said, expected, choices)
    storable(said).encode()
    once = plain(said)
    assert plain(once) == once


def _asked(said: str, expected: str, choices: list[str]) -> list[object]:
    every = [METRICS[name](said, Expected((expected,), tuple(choices))) for name in METRICS]
    assert all(0 <= verdict.score <= 1 for verdict in every)
    return [*every, judge(said, expected), final_answer(said), key(said), unwrap(expected), repeats(said)]


def bounded(target: Callable[[bytes], None]) -> Callable[[bytes], None]:
    """The target, failing when a case takes longer than `SECONDS` of processor time."""

    def too_long(number: int, frame: object) -> None:
        raise AssertionError(f"more than {SECONDS} s of processor time")

    def run(data: bytes) -> None:
        before = signal.signal(signal.SIGPROF, too_long)
        signal.setitimer(signal.ITIMER_PROF, SECONDS)
        try:
            target(data)
        finally:
            signal.setitimer(signal.ITIMER_PROF, 0)
            signal.signal(signal.SIGPROF, before)

    return run


TARGETS = {target.__name__: bounded(target) for target in (header, index, recipe, answers)}
