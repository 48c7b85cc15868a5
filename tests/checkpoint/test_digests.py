"""The digest is its formula; a receipt has a row for every file and tensor."""

from __future__ import annotations

import json
from pathlib import Path

import torch
import xxhash
from hypothesis import given, settings, strategies as st
from safetensors.torch import save_file

from vlmgraft.checkpoint.digests import (
    BLOCK,
    RECEIPT,
    block_digests,
    folder_digest,
    joined,
    range_digest,
    write_receipt,
)


@settings(max_examples=30, deadline=None)
@given(size=st.integers(0, 3 * BLOCK), begin=st.integers(0, 9), seed=st.integers(0, 9))
def test_the_digest_is_its_formula_however_it_is_read(
    size: int, begin: int, seed: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    generator = torch.Generator().manual_seed(seed)
    data = torch.randint(256, (size,), generator=generator, dtype=torch.uint8).numpy().tobytes()
    path = tmp_path_factory.getbasetemp() / "digest"
    path.write_bytes(b"x" * begin + data + b"after")
    naive = b"".join(xxhash.xxh3_128(data[at : at + BLOCK]).digest() for at in range(0, size, BLOCK))
    assert range_digest(path, begin, size) == xxhash.xxh3_128(naive).hexdigest() == joined(block_digests(data))


def test_a_receipt_names_every_file_and_tensor(tmp_path: Path) -> None:
    weights = {"a": torch.arange(3, dtype=torch.uint8), "b": torch.zeros(0, 2)}
    save_file(weights, tmp_path / "w.safetensors")
    (tmp_path / "inner").mkdir()
    (tmp_path / "inner" / "text").write_text("x")
    write_receipt(tmp_path, {"fact": 1})
    receipt = json.loads((tmp_path / RECEIPT).read_text())
    assert receipt["fact"] == 1
    assert [row["name"] for row in receipt["files"]] == ["inner/text", "w.safetensors"]
    digests = {row["name"]: row["digest"] for row in receipt["tensors"]}
    assert digests["a"] == xxhash.xxh3_128(xxhash.xxh3_128(bytes([0, 1, 2])).digest()).hexdigest()
    assert digests["b"] == xxhash.xxh3_128(b"").hexdigest()


def test_the_digest_of_a_folder_is_of_its_contents_and_not_of_its_place(tmp_path: Path) -> None:
    """A tensor in the middle of a file of more than 128 KiB differs, or a side file; a receipt does not count."""
    weights = {name: torch.full((20_000,), float(at)) for at, name in enumerate("abc")}
    changes = {"one": {}, "same": {}, "middle": {"b": torch.full((20_000,), 9.0)}, "template": {}}
    for name, change in changes.items():
        (tmp_path / name).mkdir()
        save_file(weights | change, tmp_path / name / "model.safetensors")
        (tmp_path / name / "config.json").write_text("{}")
        (tmp_path / name / "chat_template.jinja").write_text("else" if name == "template" else "{{ x }}")
        (tmp_path / name / RECEIPT).write_text(name)
    (tmp_path / "link").symlink_to(tmp_path / "same")
    digests = {name: folder_digest(tmp_path / name) for name in (*changes, "link")}
    assert digests["one"] == digests["same"] == digests["link"] and digests["one"] is not None
    assert len({digests[name] for name in ("one", "middle", "template")}) == 3
    assert folder_digest("owner/model") is None
