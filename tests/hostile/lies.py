"""The table of lies: headers, indexes, configs, special files, links, remote code, recipes, questions, pictures."""

from __future__ import annotations

import io
import json
import pickle
import struct
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from PIL import Image
from places import F32, INDEX, WEIGHTS, Case, Place, evaluate, merge, put_special, safetensors, tune


def entry(**changes: Any) -> dict[str, Any]:
    return {**F32, **changes}


def made(value: Any) -> Any:
    """What is too large to be kept is made when it is needed."""
    return value() if callable(value) else value


def wide(number: int, key: str = "w") -> str:
    return json.dumps({f"{key}{n}": F32 for n in range(number)})


HEADERS: dict[str, tuple[Any, str]] = {
    "past the end": ({"w": entry(shape=[2], data_offsets=[0, 8])}, "w ends at byte"),
    "far past the end": ({"w": entry(dtype="U8", shape=[1 << 62], data_offsets=[0, 1 << 62])}, "w ends at byte"),
    "begins past the end": ({"w": entry(data_offsets=[1 << 40, (1 << 40) + 4])}, "w ends at byte"),
    "overlap": ({"v": F32, "w": F32}, "w begins"),
    "overlap inside": ({"v": F32, "w": entry(dtype="U8", shape=[2], data_offsets=[1, 3])}, "w begins"),
    "hole": ({"v": entry(dtype="U8", data_offsets=[0, 1]), "w": entry(dtype="U8", data_offsets=[3, 4])}, "w begins"),
    "hole at the beginning": ({"w": entry(dtype="U8", data_offsets=[3, 4])}, "w begins"),
    "hole at the end": ({"w": entry(dtype="U8", data_offsets=[0, 1])}, "3 bytes after"),
    "empty tensor in the middle": ({"v": F32, "w": entry(shape=[0], data_offsets=[2, 2])}, "w begins"),
    "negative begin": ({"w": entry(data_offsets=[-4, 0])}, "data_offsets"),
    "backwards": ({"w": entry(data_offsets=[4, 0])}, "spans -4"),
    "float offsets": ({"w": entry(data_offsets=[0.0, 4.0])}, "data_offsets"),
    "exponent offsets": ('{"w":{"dtype":"F32","shape":[1],"data_offsets":[0,4e0]}}', "data_offsets"),
    "text offsets": ({"w": entry(data_offsets=["0", "4"])}, "data_offsets"),
    "boolean offsets": ({"w": entry(data_offsets=[False, 4])}, "data_offsets"),
    "null offsets": ({"w": entry(data_offsets=None)}, "data_offsets"),
    "one offset": ({"w": entry(data_offsets=[4])}, "data_offsets"),
    "three offsets": ({"w": entry(data_offsets=[0, 4, 4])}, "data_offsets"),
    "offsets as an object": ({"w": entry(data_offsets={"0": 1, "4": 2})}, "data_offsets"),
    "huge offsets": ({"w": entry(data_offsets=[0, 1 << 64])}, "data_offsets"),
    "negative shape": ({"w": entry(shape=[-1, -1])}, "shape"),
    "float shape": ({"w": entry(shape=[1.0])}, "shape"),
    "boolean shape": ({"w": entry(shape=[True])}, "shape"),
    "text shape": ({"w": entry(shape="1")}, "shape"),
    "number shape": ({"w": entry(shape=1)}, "shape"),
    "null shape": ({"w": entry(shape=None)}, "shape"),
    "nested shape": ({"w": entry(shape=[[1]])}, "shape"),
    "shape overflow": ({"w": entry(shape=[1 << 40] * 4)}, "spans 4"),
    "shape that wraps to 4 bytes": ({"w": entry(shape=[(1 << 62) + 1])}, "spans 4"),
    "huge rank": ({"w": entry(shape=[1 << 60] * 100_000)}, "more than a file"),
    "rank of ones": ({"w": entry(shape=[2] * 1000)}, "more than a file"),
    "wrong length": ({"w": entry(dtype="F16")}, "spans 4"),
    "unknown dtype": ({"w": entry(dtype="F4")}, "dtype 'F4'"),
    "dtype in another case": ({"w": entry(dtype="f32")}, "dtype 'f32'"),
    "empty dtype": ({"w": entry(dtype="")}, "dtype"),
    "dtype of another type": ({"w": entry(dtype=["F32"])}, "dtype"),
    "long dtype": ({"w": entry(dtype="F" * 5000)}, "dtype"),
    "no dtype": ({"w": {"shape": [1], "data_offsets": [0, 4]}}, "dtype"),
    "entry is a number": ({"w": 3}, "no proper"),
    "entry is null": ({"w": None}, "no proper"),
    "entry is a list": ({"w": [F32]}, "no proper"),
    "twice": (f'{{"w": {json.dumps(F32)}, "w": {json.dumps(F32)}}}', "'w' twice"),
    "key twice": ('{"w":{"dtype":"F32","dtype":"F32","shape":[1],"data_offsets":[0,4]}}', "'dtype' twice"),
    "deep": ("[" * 100_000, "JSON"),
    "deep objects": ('{"a":' * 100_000, "JSON"),
    "a list": ("[]", "mapping"),
    "a number": ("7", "mapping"),
    "empty header": ("", "JSON"),
    "half a header": ('{"w": {"dtype": "F32"', "JSON"),
    "two headers": ("{} {}", "JSON"),
    "digits": (f'{{"w":{{"dtype":"F32","shape":[{"9" * 5000}],"data_offsets":[0,4]}}}}', "JSON"),
    "not a number": ('{"w":{"dtype":"F32","shape":[NaN],"data_offsets":[0,4]}}', "NaN"),
    "UTF-16": (json.dumps({"w": F32}).encode("utf-16"), "JSON"),
    "byte order mark": (b"\xef\xbb\xbf" + json.dumps({"w": F32}).encode(), "JSON"),
    "bad UTF-8": (b'{"w\xff": 1}', "JSON"),
    "overlong UTF-8": (b'{"w\xc0\xaf": 1}', "JSON"),
    "NUL in a name": ({"w\0": F32}, "name"),
    "terminal escape": ({"w\x1b[2Jx": F32}, "name"),
    "line break": ({"w\nvlmgraft: all is well": F32}, "name"),
    "carriage return": ({"w\rx": F32}, "name"),
    "turned around": ({"w\u202egnp": F32}, "name"),
    "lone surrogate": ({"w\ud800": F32}, "name"),
    "no name": ({"": F32}, "name"),
    "long name": ({"w" * 5000: F32}, "name"),
    "path as a name": ({"../../w": F32}, "name"),
    "absolute path as a name": ({"/etc/w": F32}, "name"),
    "backslash in a name": ({"..\\w": F32}, "name"),
    "metadata of numbers": ({"__metadata__": {"a": 1}, "w": F32}, "__metadata__"),
    "metadata is a list": ({"__metadata__": [], "w": F32}, "__metadata__"),
    "no tensors": ({}, "4 bytes after"),
    "thousand overlapping": (wide(1000), "begins"),
    "millions of values": (lambda: "[" + "1," * 12_000_001 + "1]", "1,000,000 tensors"),
    "millions of lists": (lambda: "[" + "[]," * 3_000_001 + "1]", "1,000,000 tensors"),
}


def headers() -> Iterator[Case]:
    for name, (header, field) in HEADERS.items():

        def prepare(place: Place, header: Any = header) -> list[str | Path]:
            safetensors(place.own("donor"), made(header))
            return merge(place)

        yield Case(f"header: {name}", prepare, WEIGHTS, field)
    raw = {
        "empty file": b"",
        "seven bytes": b"1234567",
        "length beyond the file": (100).to_bytes(8, "little") + b"{}",
        "length beyond memory": ((1 << 64) - 1).to_bytes(8, "little") + b"{}",
        "git-lfs pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n",
        "pickle": pickle.dumps({"w": 1}),
        "zip": b"PK\x03\x04" + bytes(60),
    }
    for name, data in raw.items():

        def write(place: Place, data: bytes = data) -> list[str | Path]:
            (place.own("donor") / WEIGHTS).write_bytes(data)
            return merge(place)

        yield Case(f"file: {name}", write, WEIGHTS, "header of")

    def cut(place: Place) -> list[str | Path]:
        whole = (place.trio / "donor" / WEIGHTS).read_bytes()
        (place.own("donor") / WEIGHTS).write_bytes(whole[:-1])
        return merge(place)

    yield Case("file: truncated by a byte", cut, WEIGHTS, "truncated")


MAPS: dict[str, tuple[Any, str]] = {
    "parent": ({"w": "../s.safetensors"}, "'w'"),
    "absolute": ({"w": "/etc/s.safetensors"}, "'w'"),
    "subfolder": ({"w": "a/s.safetensors"}, "'w'"),
    "detour": ({"w": "a/../s.safetensors"}, "'w'"),
    "drive": ({"w": "C:s.safetensors"}, "'w'"),
    "backslash": ({"w": "..\\s.safetensors"}, "'w'"),
    "dots": ({"w": ".."}, "'w'"),
    "empty": ({"w": ""}, "'w'"),
    "NUL": ({"w": "s\0.safetensors"}, "'w'"),
    "escape": ({"w": "s\x1b[2J.safetensors"}, "'w'"),
    "pickle": ({"w": "s.bin"}, "'w'"),
    "number": ({"w": 3}, "'w'"),
    "list": ({"w": ["s.safetensors"]}, "'w'"),
    "null": ({"w": None}, "'w'"),
    "missing shard": ({"w": "t.safetensors"}, "t.safetensors"),
    "absent tensor": ({"w": "s.safetensors", "x": "s.safetensors"}, "says that x"),
    "no map": (None, "weight_map"),
    "empty map": ({}, "weight_map"),
    "a list for a map": (["w"], "weight_map"),
}


def indexes() -> Iterator[Case]:
    texts = {name: (json.dumps({"weight_map": found}), field) for name, (found, field) in MAPS.items()}
    texts |= {
        "not JSON": ("{", "JSON"),
        "list": ("[]", "mapping"),
        "deep": ('{"weight_map":' + "[" * 100_000, "JSON"),
        "tensor twice": ('{"weight_map": {"w": "s.safetensors", "w": "s.safetensors"}}', "'w' twice"),
        "millions": (lambda: '{"weight_map": {' + '"":1,' * 12_000_001 + '"":1}}', "1,000,000 tensors"),
        "a million and one": (
            lambda: '{"weight_map": {' + ",".join(f'"{n}":""' for n in range(1_000_001)) + "}}",
            "1,000,000 tensors",
        ),
    }
    for name, (text, field) in texts.items():

        def prepare(place: Place, text: Any = text) -> list[str | Path]:
            safetensors(place.own("donor"), {"w": F32}, name="s.safetensors")
            (place.folder / "donor" / INDEX).write_text(made(text))
            return merge(place)

        yield Case(f"index: {name}", prepare, "donor", field)

    def two(place: Place) -> list[str | Path]:
        for shard in ("s", "t"):
            safetensors(
                place.own("donor") if shard == "s" else place.folder / "donor", {"w": F32}, name=f"{shard}.safetensors"
            )
        return merge(place)

    yield Case("index: none for two files", two, "donor", INDEX)


CONFIGS: dict[str, tuple[str, str]] = {
    "not JSON": ("{", "JSON"),
    "list": ("[]", "mapping"),
    "escape in model_type": (json.dumps({"model_type": "q\x1b[2J"}), "model_type"),
    "model_type is a list": (json.dumps({"model_type": ["qwen2"]}), "model_type"),
    "endless model_type": (json.dumps({"model_type": "q" * 10_000}), "model_type"),
    "inner model_type": (json.dumps({"text_config": {"model_type": "\n"}}), "text_config.model_type"),
    "text_config is a text": (json.dumps({"text_config": "qwen2"}), "text_config"),
    "a billion layers": (json.dumps({"num_hidden_layers": 10**9}), "num_hidden_layers"),
    "negative layers": (json.dumps({"vision_config": {"depth": -1}}), "vision_config.depth"),
    "infinite experts": ('{"num_experts": Infinity}', "num_experts"),
    "thirty million layers below": (
        json.dumps({"model_type": "qwen2", "a": {"b": {"num_hidden_layers": 30_000_000}}}),
        "a.b.num_hidden_layers",
    ),
    "more layers than tensors": (json.dumps({"model_type": "qwen2", "num_hidden_layers": 9_999}), "num_hidden_layers"),
    "n_layer": (json.dumps({"model_type": "qwen2", "n_layer": 30_000_000}), "n_layer"),
    "millions of experts": (json.dumps({"text_config": {"n_routed_experts": 10**7}}), "n_routed_experts"),
    "infinite layers": ('{"num_hidden_layers": Infinity}', "num_hidden_layers"),
    "layers that are no number": ('{"num_hidden_layers": NaN}', "num_hidden_layers"),
    "deep": ("[" * 100_000, "JSON"),
    "large": ('{"a": "' + "a" * 10_000_000 + '"}', "10,000,000 bytes"),
}


def configs() -> Iterator[Case]:
    for name, (text, field) in CONFIGS.items():

        def prepare(place: Place, text: str = text) -> list[str | Path]:
            (place.own("vlm", weights=True) / "config.json").write_text(text)
            return merge(place)

        yield Case(f"config: {name}", prepare, "config.json", field)


GROWTH: dict[str, tuple[str, Any, str]] = {
    "beams": ("generation_config.json", {"num_beams": 10_000_000}, "num_beams"),
    "returned sequences": ("generation_config.json", {"num_return_sequences": 1e9}, "num_return_sequences"),
    "beams in config.json": ("config.json", {"num_beams": 10_000_000}, "num_beams"),
    "a tokenizer that doubles": ("tokenizer.json", {"normalizer": "doubles"}, "normalizer"),
    "a token of a million characters": ("tokenizer.json", {"model": "long"}, "1,000,000 characters"),
    "an enormous tokenizer": ("tokenizer.json", {"added": "x" * 64_000_000}, "64,000,000 bytes"),
}


def growths() -> Iterator[Case]:
    """Folders that load, and then take for ever or all memory."""
    doubles = {
        "type": "Sequence",
        "normalizers": [{"type": "Replace", "pattern": {"String": "a"}, "content": "aa"}] * 40,
    }
    for name, (file, changes, field) in GROWTH.items():

        def prepare(place: Place, file: str = file, changes: Any = changes) -> list[str | Path]:
            path = place.own("vlm", weights=True) / file
            found = json.loads(path.read_text()) if path.exists() else {}
            if changes == {"normalizer": "doubles"}:
                found["normalizer"] = doubles
            elif changes == {"model": "long"}:
                found["model"]["vocab"] = {**found["model"]["vocab"], "x" * 1_000_000: 10**6}
            else:
                found |= changes
            path.write_text(json.dumps(found))
            return evaluate(place, place.questions({"question": "q", "answer": "a"}))

        yield Case(f"growth: {name}", prepare, file, field)


def packed(place: Place, *, rows: int, width: int) -> Path:
    """A parquet file whose column unpacks to rows × width bytes of zeros."""
    import pyarrow
    from pyarrow import parquet

    cells = pyarrow.array(["0" * width] * rows)
    table = pyarrow.table({"question": cells, "answer": ["a"] * rows})
    parquet.write_table(table, place.folder / "q.parquet", compression="zstd", use_dictionary=False)
    return place.folder / "q.parquet"


def parquets() -> Iterator[Case]:
    for name, rows, width in (("one cell", 1, 70_000_000), ("a column", 1000, 100_000)):

        def prepare(place: Place, rows: int = rows, width: int = width) -> list[str | Path]:
            return evaluate(place, packed(place, rows=rows, width=width))

        yield Case(f"parquet: {name} that unpacks to a hundred megabytes", prepare, "q.parquet", "'question'")


def repeated(place: Place, rows: int, *, nested: bool) -> Path:
    """A parquet file of one text of 20 MB that a dictionary repeats in every row, as a column or inside a picture's."""
    import pyarrow
    from pyarrow import parquet

    values = pyarrow.DictionaryArray.from_arrays(pyarrow.array([0] * rows), pyarrow.array([b"0" * 20_000_000]))
    column = pyarrow.StructArray.from_arrays([values], ["bytes"]) if nested else values
    table = pyarrow.table({"image": column, "question": ["q"] * rows})
    parquet.write_table(table, place.folder / "q.parquet", compression="zstd")
    return place.folder / "q.parquet"


def dictionaries() -> Iterator[Case]:
    for nested in (False, True):

        def prepare(place: Place, nested: bool = nested) -> list[str | Path]:
            return evaluate(place, repeated(place, 1000, nested=nested))

        field = "image.bytes" if nested else "'image' unpacks"
        yield Case(
            f"parquet: a dictionary that repeats {'pictures' if nested else 'a text'}", prepare, "q.parquet", field
        )


def specials() -> Iterator[Case]:
    kinds = {"FIFO": "a FIFO", "device": "a device", "socket": "a socket", "link": "leads nowhere"}
    for kind, said in kinds.items():
        for file in (WEIGHTS, "config.json", INDEX, "tokenizer.json"):

            def prepare(place: Place, kind: str = kind, file: str = file) -> list[str | Path]:
                put_special(place.own("vlm", weights=file != WEIGHTS) / file, kind)
                return merge(place)

            yield Case(f"{kind} as {file}", prepare, file, said)
    for file in (WEIGHTS, "config.json"):

        def folder(place: Place, file: str = file) -> list[str | Path]:
            put_special(place.own("vlm", weights=file != WEIGHTS) / file, "folder")
            return merge(place)

        yield Case(f"folder as {file}", folder, file, "a folder")
    for kind in ("FIFO", "device", "folder"):

        def recipe(place: Place, kind: str = kind) -> list[str | Path]:
            put_special(place.recipe(), kind)
            return merge(place, place.folder / "recipe.yaml")

        yield Case(f"{kind} as recipe", recipe, "recipe.yaml", kind)


def folders() -> Iterator[Case]:
    """Links out, remote code, adapters, pickles."""

    def secret(place: Place) -> list[str | Path]:
        (place.folder / "secret").write_text("{}")
        (place.own("vlm", weights=True) / "extra.json").symlink_to(place.folder / "secret")
        return merge(place)

    yield Case("side file is a link out", secret, "extra.json", "link to")

    def named(place: Place) -> list[str | Path]:
        (place.own("vlm", weights=True) / "a\x1b[2J.json").write_text("{}")
        return merge(place)

    yield Case("side file with an escape in its name", named, "vlm", "\\x1b")

    def adapter(place: Place) -> list[str | Path]:
        (place.own("vlm", weights=True) / "adapter_config.json").write_text(
            json.dumps({"base_model_name_or_path": str(place.folder / "evil")})
        )
        return evaluate(place, place.questions({"question": "q", "answer": "a"}))

    yield Case("adapter", adapter, "adapter_config.json", "base_model_name_or_path")

    def remote(place: Place) -> list[str | Path]:
        folder = place.own("vlm", weights=True)
        config = json.loads((folder / "config.json").read_text())
        config |= {"model_type": "evil", "auto_map": {"AutoConfig": "evil.Config", "AutoModel": "evil.Model"}}
        (folder / "config.json").write_text(json.dumps(config))
        (folder / "evil.py").write_text(f"open({str(place.folder / 'ran')!r}, 'w')")
        return evaluate(place, place.questions({"question": "q", "answer": "a"}))

    yield Case("remote code", remote, "vlm", "auto_map")
    for file in ("pytorch_model.bin", "model.pt", "consolidated.pth"):

        def bomb(place: Place, file: str = file) -> list[str | Path]:
            (place.own("vlm") / file).write_bytes(pickle.dumps(_Bomb(str(place.folder / "ran"))))
            return evaluate(place, place.questions({"question": "q", "answer": "a"}))

        yield Case(f"pickle in {file}", bomb, "vlm", "safetensors")


class _Bomb:
    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return (open, (self.path, "w"))


def grown() -> str:
    text = "&a0 [x, x, x, x, x, x, x, x, x]"
    for n in range(1, 10):
        text = f"&a{n} [{text}, {', '.join([f'*a{n - 1}'] * 8)}]"
    return text


def doubled() -> str:
    """Merge keys that each hold the one before twice."""
    text = "a0: &a0 {x: 1}\n"
    for n in range(1, 8):
        text += f"a{n}: &a{n} {{<<: [*a{n - 1}, *a{n - 1}]}}\n"
    return text


MODELS = "vlm: a\ndonor: b\ndonor_base: c\n"
RECIPES: dict[str, tuple[str | bytes, str]] = {
    "runs a command": ("vlm: !!python/object/apply:os.system [touch ran]\n", "python/object"),
    "names a function": ("vlm: !!python/name:os.system\n", "python/name"),
    "includes": ("vlm: !include /etc/passwd\n", "!include"),
    "aliases": (f"{MODELS}method: {{name: {grown()}}}", "aliases"),
    "aliases in modules": (f"{MODELS}modules: {grown()}", "aliases"),
    "alias of itself": (f"{MODELS}modules: &a [*a]\nmethod: linear", "nested too deeply"),
    "deep": ("vlm: " + "[" * 5_000 + "]" * 5_000, "nested"),
    "large": ("vlm: " + "a" * 1_000_001, "1,000,000 bytes"),
    "not YAML": ("vlm: [", "YAML"),
    "tabs": ("vlm:\t\tx: y", "YAML"),
    "NUL": (b"vlm: a\0b", "YAML"),
    "escape": (b"vlm: \x1b[2J", "YAML"),
    "not UTF-8": (b"vlm: \xff\xfe", "UTF-8"),
    "two documents": ("vlm: a\n---\nvlm: b\n", "document"),
    "empty": ("", "mapping"),
    "list": ("- vlm", "mapping"),
    "bad date": ("vlm: 2001-99-99", "month"),
    "bad number": ("vlm: 0b_", "YAML"),
    "digits": ("vlm: " + "9" * 5000, "YAML"),
    "list as a key": ("? [a]\n: b", "YAML"),
    "unknown key": (f"{MODELS}methods: linear", "methods"),
    "no vlm": ("donor: b\ndonor_base: c\nmethod: task_arithmetic", "vlm"),
    "vlm is a mapping": ("vlm: {a: b}\ndonor: b\ndonor_base: c\nmethod: task_arithmetic", "vlm"),
    "long vlm": (f"vlm: {'a' * 5000}\ndonor: b\nmethod: linear", "aaa"),
    "method is a list": (f"{MODELS}method: [linear]", "method"),
    "method is a date": (f"{MODELS}method: 2001-01-01", "method"),
    "unhashable method": (f"{MODELS}method: {{name: [a]}}", "method.name"),
    "no such method": (f"{MODELS}method: magic", "magic"),
    "infinite scale": (f"{MODELS}method: {{name: task_arithmetic, scale: .inf}}", "method.scale"),
    "scale is no number": (f"{MODELS}method: {{name: task_arithmetic, scale: .nan}}", "method.scale"),
    "scale is a text": (f"{MODELS}method: {{name: task_arithmetic, scale: much}}", "method.scale"),
    "enormous scale": (f"{MODELS}method: {{name: task_arithmetic, scale: {'9' * 400}}}", "method.scale"),
    "shards of nothing": (f"{MODELS}method: linear\noutput: {{shard_size: 0}}", "shard_size"),
    "shards of text": (f"{MODELS}method: linear\noutput: {{shard_size: lots}}", "shard_size"),
    "layers is true": (f"{MODELS}method: linear\nlayers: true", "layers"),
    "a layer is true": (f"{MODELS}method: linear\nlayers: [0, true]", "layers.1"),
    "scale is true": (f"{MODELS}method: {{name: task_arithmetic, scale: true}}", "method.scale"),
    "a key twice": (f"{MODELS}vlm: b\nmethod: linear", "vlm stands in lines"),
    "an option twice": (
        f"{MODELS}method: {{name: task_arithmetic, scale: 1, scale: 2}}",
        "method.scale stands in lines",
    ),
    "merge keys": (f"{MODELS}method: {{<<: {{name: linear}}}}", "merge keys"),
    "merge keys that double": (doubled(), "merge keys"),
    "learning rate without end": (
        f"{MODELS}method: {{name: frism, learning_rate: .inf, calibration: {{data: d}}}}",
        "method.learning_rate",
    ),
    "mergekit of one model": ("merge_method: linear\nmodels: [{model: a}]", "models"),
    "mergekit of texts": ("merge_method: linear\nmodels: [a, b]", "models"),
    "mergekit models as a number": ("merge_method: linear\nmodels: 3", "models"),
    "mergekit slices": ("slices: []", "slices"),
}


def recipes() -> Iterator[Case]:
    for name, (text, field) in RECIPES.items():

        def prepare(place: Place, text: str | bytes = text) -> list[str | Path]:
            return merge(place, place.text(text))

        yield Case(f"recipe: {name}", prepare, "" if name == "long vlm" else "recipe.yaml", field)
    for text in ("0-999999999", "0-99999999999999", "9" * 5000, "999999999-0"):

        def selected(place: Place, text: str = text) -> list[str | Path]:
            return merge(place, place.recipe(layers=text))

        yield Case(f"recipe: layers {text[:20]}", selected, "", "layers: ")
    for name, override in {
        "tag": "method.scale=!!python/name:os.system",
        "deep": "method.scale=" + "[" * 1500,
        "no value": "method.scale",
        "bad number": "method.scale=0b_",
        "through a text": "vlm.a.b=3",
    }.items():

        def override_it(place: Place, override: str = override) -> list[str | Path]:
            return [*merge(place), "--set", override]

        yield Case(f"--set: {name}", override_it, "--set", override[:8])


QUESTIONS: dict[str, tuple[bytes | str | dict[str, Any], str]] = {
    "not JSON": ("{", "JSON"),
    "list": ("[]", "object"),
    "deep": ("[" * 100_000, "JSON"),
    "digits": ('{"question": ' + "9" * 5000 + "}", "JSON"),
    "not UTF-8": (b'{"question": "\xff"}', "JSON"),
    "huge line": (b'{"question": "' + b"a" * (1 << 26) + b'"}', "bytes"),
    "half a character": ('{"question": "\\ud800"}', "surrogates"),
    "no question": ({"image": "a.png"}, "question"),
    "question is a number": ({"question": 3}, "question"),
    "image is a number": ({"question": "q", "image": 3}, "image"),
    "image is a mapping": ({"question": "q", "image": {"a": 1}}, "image"),
    "choices are a text": ({"question": "q", "image": "good.png", "choices": "A"}, "neither a list nor lettered"),
    "image is missing": ({"question": "q", "image": "gone.png"}, "gone.png"),
    "image is a folder": ({"question": "q", "image": "."}, "image"),
    "image is a device": ({"question": "q", "image": "/dev/zero"}, "/dev/zero"),
    "image has a NUL": ({"question": "q", "image": "a\0.png"}, "image"),
    "image has a long name": ({"question": "q", "image": "a" * 5000}, "image"),
}


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width: int, height: int, *more: bytes) -> bytes:
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + b"".join(more) + chunk(b"IDAT", zlib.compress(bytes(99))) + chunk(b"IEND", b"")


PICTURES: dict[str, Callable[[], bytes]] = {
    "empty": lambda: b"",
    "text": lambda: b"no picture",
    "SVG": lambda: b'<svg xmlns="http://www.w3.org/2000/svg"><image href="file:///etc/passwd"/></svg>',
    "EPS, which would start Ghostscript": lambda: b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n",
    "PNG of 100,000 x 100,000": lambda: png(100_000, 100_000),
    "PNG just above the limit": lambda: png(10_000, 9_000),
    "PNG of no width": lambda: png(0, 9),
    "PNG cut": lambda: png(9, 9)[:-30],
    "PNG with a wrong checksum": lambda: png(9, 9)[:30] + b"0000" + png(9, 9)[34:],
    "PNG with texts of 32 MB": lambda: png(
        9,
        9,
        chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(1 << 25), 9)),
        chunk(b"iTXt", b"a\0\1\0\0\0" + zlib.compress(bytes(1 << 25), 9)),
    ),
    "GIF of 60,000 x 60,000": lambda: b"GIF89a" + struct.pack("<HHBBB", 60_000, 60_000, 0, 0, 0) + b";",
    "JPEG cut": lambda: b"\xff\xd8\xff\xe0\x00\x10JFIF\x00",
    "TIFF of loops": lambda: b"II*\x00\x08\x00\x00\x00\x00\x00\x08\x00\x00\x00",
    "BMP that lies": lambda: (
        b"BM" + struct.pack("<IHHIIiiHHIIiiII", 99, 0, 0, 54, 40, 1 << 30, 1 << 30, 1, 24, 0, 0, 0, 0, 0, 0)
    ),
}


def png_of(width: int, height: int) -> bytes:
    """A whole picture."""
    whole = io.BytesIO()
    Image.new("RGB", (width, height)).save(whole, "PNG")
    return whole.getvalue()


def questions() -> Iterator[Case]:
    for name, (row, field) in QUESTIONS.items():

        def prepare(place: Place, row: Any = row) -> list[str | Path]:
            return merge(place, place.calibrated(place.questions(row, row)))

        yield Case(f"questions: {name}", prepare, "q.jsonl", field)
    for name, make in PICTURES.items():

        def picture(place: Place, make: Callable[[], bytes] = make) -> list[str | Path]:
            (place.folder / "p.png").write_bytes(make())
            row = {"question": "q", "image": "p.png"}
            return merge(place, place.calibrated(place.questions(row, row)))

        yield Case(f"picture: {name}", picture, "p.png", "line 1")

    def waiting(place: Place) -> list[str | Path]:
        put_special(place.folder / "p.png", "FIFO")
        return merge(place, place.calibrated(place.questions({"question": "q", "image": "p.png"})))

    yield Case("picture: FIFO", waiting, "p.png", "FIFO")
    for name, data in {"JSON": b"[[]]", "parquet": b"PAR1" + bytes(50) + b"PAR1", "jsonl": b"[" * 100_000}.items():

        def told(place: Place, name: str = name, data: bytes = data) -> list[str | Path]:
            return evaluate(place, place.questions(data, name=f"q.{name.lower()}"))

        yield Case(
            f"evaluate: {name} that lies", told, f"q.{name.lower()}", "JSON" if "J" in name.upper()[0] else "parquet"
        )

    def marked(place: Place) -> list[str | Path]:
        (place.folder / "p.png").write_bytes(png_of(28, 28))
        rows = [{"question": text, "image": "p.png"} for text in ("q", "<|image_pad|> q")]
        return merge(place, place.calibrated(place.questions(*rows)))

    yield Case("questions: a mark that stands for a picture", marked, "q.jsonl", "line 2")


CHAT = {"role": "user", "content": "q"}
TRACES: dict[str, tuple[bytes | str | dict[str, Any], str]] = {
    **{name: case for name, case in QUESTIONS.items() if "UTF-8" in name or not isinstance(case[0], dict)},
    "chat is a text": ({"messages": "x" * 10_000}, "list of turns"),
    "turn is a text": ({"messages": ["x"]}, "list of turns"),
    "turn says a number": ({"messages": [{"role": "user", "content": 3}, CHAT]}, "part of a turn"),
    "turn says a mapping": ({"messages": [{"role": "user", "content": {"a": 1}}, CHAT]}, "part of a turn"),
    "part is a text": ({"messages": [{"role": "user", "content": ["x"]}, CHAT]}, "part of a turn"),
    "part without text": ({"messages": [{"role": "user", "content": [{"type": "text"}]}, CHAT]}, "part of a turn"),
    "role is a list": ({"messages": [{"role": ["x"] * 999, "content": "q"}, CHAT]}, "role"),
    "answer is a mapping": ({"question": "q", "answer": {"a": 1}}, "answer"),
    "reasoning is a number": ({"question": "q", "answer": "a", "reasoning": 3}, "reasoning"),
    "other keys": ({"k" * 10_000: 1, "\x1b[2J": 1}, "question"),
    "image is a number": ({"question": "q", "answer": "a", "image": 3}, "image"),
    "image is missing": ({"question": "q", "answer": "a", "image": "gone.png"}, "gone.png"),
    "image is a folder": ({"question": "q", "answer": "a", "image": "."}, "image"),
    "image is a device": ({"question": "q", "answer": "a", "image": "/dev/zero"}, "/dev/zero"),
    "image has a NUL": ({"question": "q", "answer": "a", "image": "a\0.png"}, "image"),
}


def traces() -> Iterator[Case]:
    for name, (row, field) in TRACES.items():

        def prepare(place: Place, row: Any = row) -> list[str | Path]:
            return tune(place, place.questions(row, row))

        yield Case(f"traces: {name}", prepare, "q.jsonl", field)
    for name in ("EPS, which would start Ghostscript", "PNG just above the limit", "PNG with texts of 32 MB"):

        def picture(place: Place, make: Callable[[], bytes] = PICTURES[name]) -> list[str | Path]:
            (place.folder / "p.png").write_bytes(make())
            row = {"question": "q", "answer": "a", "image": "p.png"}
            return tune(place, place.questions(row, row))

        yield Case(f"traces: picture: {name}", picture, "p.png", "row 1")
    for name, data in {"q.json": b"[" * 100_000, "q.parquet": b"PAR1" + bytes(50) + b"PAR1"}.items():

        def told(place: Place, name: str = name, data: bytes = data) -> list[str | Path]:
            return tune(place, place.questions(data, name=name))

        yield Case(f"traces: {name} that lies", told, name, "JSON" if "json" in name else "parquet")

    def waiting(place: Place) -> list[str | Path]:
        put_special(place.folder / "q.jsonl", "FIFO")
        return tune(place, place.folder / "q.jsonl")

    yield Case("traces: FIFO", waiting, "q.jsonl", "no such file")


GROUPS = (headers, indexes, configs, growths, parquets, dictionaries, specials, folders, recipes, questions, traces)
CASES = [case for group in GROUPS for case in group()]
