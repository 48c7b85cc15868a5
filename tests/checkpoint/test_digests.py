"""The digest is its formula; a receipt has a row for every file and tensor."""

from __future__ import annotations

import json
from pathlib import Path

import torch
import xxhash
from hypothesis import given, settings, strategies as st
from safetensors.torch import save_file

from vlmgraft.checkpoint.digests import BLOCK, RECEIPT, block_digests, joined, range_digest, write_receipt


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
