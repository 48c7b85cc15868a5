"""Digests that tell a damaged file from a whole one, cheap enough to take of every byte that is written.

A digest is the XXH3-128 of the XXH3-128s of consecutive blocks of 256 KiB, so that threads may write the blocks of one
tensor in any order. It finds accidents: flipped bits, lost writes, files that were edited. It is no signature: who
changes the weights on purpose can change the receipt as well, and a cryptographic hash there would not stop it.
Measured on two cores: SHA-256 takes 1.5 GB/s a core and made a merge by task arithmetic 31 to 45 % longer, XXH3 70 GB/s
in the cache and nothing that shows above the scatter.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import xxhash

from vlmgraft.records import json_text

BLOCK = 1 << 18
"""Bytes of a block."""
READ = 16 * BLOCK
RECEIPT = "receipt.json"


@dataclass(frozen=True)
class FileReceipt:
    """One file of a folder. name: relative to it, with slashes. digest: of its first `digested` bytes; after those a
    file of weights holds the bytes of `tensors`."""

    name: str
    size: int
    digested: int
    digest: str
    tensors: tuple[str, ...] = ()


def block_digests(data: memoryview | bytes) -> list[bytes]:
    """One digest for each block; the last block may be short."""
    return [xxhash.xxh3_128_digest(data[at : at + BLOCK]) for at in range(0, len(data), BLOCK)]


def joined(digests: Iterable[bytes]) -> str:
    """The digest, in hexadecimal, of what has these blocks."""
    return str(xxhash.xxh3_128_hexdigest(b"".join(digests)))


def range_digest(path: Path, begin: int, size: int) -> str:
    """The digest of `size` bytes of a file from `begin` on, or of fewer where the file ends; raises OSError."""
    found: list[bytes] = []
    buffer = memoryview(bytearray(min(size, READ)))
    with path.open("rb", buffering=0) as file:
        file.seek(begin)
        while size:
            filled = 0
            while filled < min(size, READ):
                count = file.readinto(buffer[filled : min(size, READ)])
                if not count:
                    return joined([*found, *block_digests(buffer[:filled])])
                filled += count
            found += block_digests(buffer[:filled])
            size -= filled
    return joined(found)


def whole_file(path: Path, folder: Path) -> FileReceipt:
    """The receipt of a file in `folder` whose every byte is digested."""
    size = path.stat().st_size
    return FileReceipt(path.relative_to(folder).as_posix(), size, size, range_digest(path, 0, size))


def whole_text(name: str, text: str) -> FileReceipt:
    """The receipt of a file of this text."""
    data = text.encode()
    return FileReceipt(name, len(data), len(data), joined(block_digests(data)))


def files_in(folder: Path) -> list[Path]:
    """All files in a folder and its folders, in order."""
    return sorted(path for path in folder.rglob("*") if path.is_file())


def seal(document: dict[str, Any]) -> str:
    """The digest of a JSON document as `write_json` writes it, its own key "digest" left empty."""
    return joined(block_digests(json_text({**document, "digest": ""}).encode()))
