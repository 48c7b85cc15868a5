"""What is fuzzed: bytes in, nothing out, an exception where a promise does not hold.

header, index, recipe: what is wrong is refused by a `VlmgraftError` that names the file in one printable line; what is
accepted keeps its word (the safetensors library reads the same tensors; all files lie in the folder; the recipe written
and read again is the same). config: the same of config.json, generation_config.json and tokenizer.json, and a pair is
aligned. pictures: what is accepted is RGB of bounded size. receipt, factors, gates: the same of folders that we wrote.
answers: nothing is raised, and asking twice gives the same.

A case may take two seconds of processor time and, beyond what the process has, 500 MB.

The first byte chooses how the others are read, so that the fuzzer reaches deep parts without having to guess lengths.
"""

from __future__ import annotations

import atexit
import json
import math
import resource
import shutil
import signal
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path

from safetensors import safe_open

from vlmgraft.alignment import align
from vlmgraft.checkpoint.digests import RECEIPT, seal
from vlmgraft.checkpoint.files import INDEX
from vlmgraft.checkpoint.header import read_header
from vlmgraft.checkpoint.index import open_checkpoint
from vlmgraft.checkpoint.verify import verify
from vlmgraft.data.images import MAX_PIXELS, check_picture, open_picture
from vlmgraft.errors import VlmgraftError
from vlmgraft.evaluation.answers import algebra, final_answer, judge, repeats
from vlmgraft.evaluation.answers.text import key, plain, storable, unwrap
from vlmgraft.evaluation.items import Expected
from vlmgraft.evaluation.metrics import METRICS
from vlmgraft.hf.limits import refuse_growth
from vlmgraft.recipe.model import dump_recipe, load_recipe
from vlmgraft.recipe.tune import dump_tune_recipe, load_tune_recipe
from vlmgraft.spectral.factor_store import FactorStore
from vlmgraft.spectral.gate_store import load_gates
from vlmgraft.storage.jsonl import json_text

LONGEST_MESSAGE = 2_000
SECONDS = 2
"""Processor time of one case, in this process; a loaded machine does not change it."""
MEMORY = 500_000_000
"""Bytes that the process may have at most beyond what it had when its first case began."""
algebra.SECONDS = 2  # processor time of one comparison, in a process of its own; a user's is 10

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
    """An index file beside two good shards."""
    place = folder()
    (place / "model.safetensors").unlink(missing_ok=True)
    (place / INDEX).write_bytes(data[1:])
    (place / "config.json").write_bytes(b"{}")
    try:
        found = open_checkpoint(place)
    except VlmgraftError as error:
        refused(error, str(place))
        return
    assert all(file.parent == place and file.is_file() for file in found.files)
    assert set(found.tensors) <= {"w1", "w2"}


LETTERS = {"q": (4, 4), "k": (2, 4), "v": (2, 4), "o": (4, 4)}
DECODER = {
    "embed_tokens.weight": (5, 4),
    **{f"layers.0.self_attn.{letter}_proj.weight": shape for letter, shape in LETTERS.items()},
    "layers.0.input_layernorm.weight": (4,),
    "norm.weight": (4,),
}
CONFIG = b'{"model_type": "%s", "num_hidden_layers": 1, "hidden_size": 4, "num_attention_heads": 2}'


@cache
def pair() -> Path:
    """A folder with the headers of a small VLM, and of its donor."""
    tower = {"vision.embeddings.weight": (4, 3)}
    for name, model_type, prefix, more in (("vlm", b"llava", "language_model.", tower), ("donor", b"llama", "", {})):
        place, entries, at = _empty(name), {}, 0
        for tensor, shape in ({prefix + inner: shape for inner, shape in DECODER.items()} | more).items():
            begin, at = at, at + 2 * math.prod(shape)
            entries[tensor] = {"dtype": "BF16", "shape": shape, "data_offsets": [begin, at]}
        (place / "model.safetensors").write_bytes(_as_file(b"\xff" + json.dumps(entries).encode(), at))
        (place / "config.json").write_bytes(CONFIG % model_type)
    return folder()


def config(data: bytes) -> None:
    """The config, generation config or tokenizer of a VLM; where its config is read, it is aligned with a donor."""
    vlm, donor = pair() / "vlm", pair() / "donor"
    names = ("config.json", "config.json", "generation_config.json", "tokenizer.json")
    name = names[data[0] % 4 if data else 0]
    for other in {*names} - {name}:
        (vlm / other).unlink(missing_ok=True)
    (vlm / name).write_bytes(data[1:])
    try:
        checkpoint = open_checkpoint(vlm)
        refuse_growth(vlm)
    except VlmgraftError as error:
        refused(error, name)
        return
    if name == "config.json":
        try:
            aligned = align(checkpoint, open_checkpoint(donor), None)
        except VlmgraftError as error:
            refused(error, "vlm")
            return
        assert [tensor.name for tensor in aligned.tensors] == list(checkpoint.tensors)


def pictures(data: bytes) -> None:
    """A picture in a row of data: what its check passes is opened, or named."""
    for reader in (check_picture, open_picture):
        try:
            picture = reader(data, "row 3")
        except VlmgraftError as error:
            refused(error, "row 3")
            continue
        if picture is not None:
            assert picture.mode == "RGB" and 0 < picture.width * picture.height <= MAX_PIXELS


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


def receipt(data: bytes) -> None:
    """A receipt beside a file of weights and a text: as it is, or, where it is JSON, with its seal made right."""
    place = _empty("receipt")
    text = ENTRY % b"w"
    (place / "w.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + b"1234")
    (place / "a.txt").write_bytes(b"a")
    raw = data[1:]
    if data[:1] < b"\x80":
        try:
            document = json.loads(raw)
            raw = json_text({**document, "digest": seal(document)}).encode()
        except (ValueError, TypeError, RecursionError):
            pass
    (place / RECEIPT).write_bytes(raw)
    try:
        found = verify(place)
    except VlmgraftError as error:
        refused(error, str(place))
        return
    assert all(str(fault).isprintable() for fault in found.faults)
    if found.unchanged:  # then it covers all there is
        listed = json.loads(raw)
        assert {row["name"] for row in listed["files"]} == {"w.safetensors", "a.txt"}
        assert [row["name"] for row in listed["tensors"]] == ["w"]


def factors(data: bytes) -> None:
    """A store of factors whose manifest, or whose file of one matrix, is what it is."""
    place = _empty("factors")
    good = b'{"digest": "d", "rank": "full", "matrices": {"w": {"energy": 1.0, "error": 0.0}}}'
    (place / "factors.json").write_bytes(data[1:] if data[:1] < b"\x80" else good)
    (place / "w.safetensors").write_bytes(_as_file(data[1:]) if data[:1] >= b"\x80" else b"")
    try:
        store = FactorStore(place)
        for name in store:
            store.header(name)
            store.load(name)
    except VlmgraftError as error:
        refused(error, str(place))


def gates(data: bytes) -> None:
    """A folder of gates: settings, tensors or the log of the training are what they are."""
    place = _empty("gates")
    text = b'{"w":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}'
    (place / "gates.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + bytes(4))
    (place / "gates.json").write_bytes(b'{"scale": 1.0, "factors": "d"}')
    file = ("gates.json", "gates.safetensors", "training.jsonl")[data[0] % 3 if data else 0]
    (place / file).write_bytes(_as_file(data[1:]) if file.endswith("s") else data[1:])
    try:
        loaded = load_gates(place)
    except VlmgraftError as error:
        refused(error, str(place))
        return
    assert math.isfinite(loaded.scale) and not any(value.isnan().any() for value in loaded.logits.values())


def _empty(name: str) -> Path:
    """A folder with nothing in it."""
    place = folder() / name
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir()
    return place


def _as_file(data: bytes, size: int = 64) -> bytes:
    """A safetensors file: as it is, or a header text whose length is right before `size` bytes of data."""
    text = data[1:]
    return text if data[:1] < b"\x40" else len(text).to_bytes(8, "little") + text + bytes(size)


_compare = algebra.compare


def answers(data: bytes) -> None:
    """What a model says (perhaps one piece over and over) against an expected answer and choices; math-verify is asked
    by a quarter of the first bytes only, since each question takes it a thousand times as long."""
    algebra.compare = _compare if data[:1] and data[0] % 4 == 1 else lambda said, expected: algebra.Equality(None)
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
    """The target, failing when a case takes longer than `SECONDS` of processor time or more than `MEMORY`."""
    before_all: list[int] = []

    def too_long(number: int, frame: object) -> None:
        raise AssertionError(f"more than {SECONDS} s of processor time")

    def run(data: bytes) -> None:
        before_all[:] = before_all or [peak()]
        before = signal.signal(signal.SIGPROF, too_long)
        signal.setitimer(signal.ITIMER_PROF, SECONDS)
        try:
            target(data)
        finally:
            signal.setitimer(signal.ITIMER_PROF, 0)
            signal.signal(signal.SIGPROF, before)
        used = peak() - before_all[0]
        assert used <= MEMORY, f"{used:,} bytes of memory"

    return run


def peak() -> int:
    """Bytes that this process had at most."""
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


READERS = (header, index, config, recipe, receipt, factors, gates, answers, pictures)
TARGETS = {target.__name__: bounded(target) for target in READERS}
