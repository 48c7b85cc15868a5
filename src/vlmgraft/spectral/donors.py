"""Stores of factors of one donor or several: the first one's in the folder itself, the others' in folders inside."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from vlmgraft.errors import CheckpointError
from vlmgraft.spectral.factors import Factors, FactorStore, join_donors


def donor_folder(folder: Path, number: int) -> Path:
    """Where the factors of donor `number`, counted from 0, are kept."""
    return folder if number == 0 else folder / f"donor-{number + 1}"


class JoinedStore(Mapping[str, Factors]):
    """Factors of several donors side by side (`join_donors`), read one matrix at a time.

    Raises CheckpointError when the stores do not hold the same tensors.
    """

    def __init__(self, stores: Sequence[FactorStore]) -> None:
        self.stores = tuple(stores)
        self.names = self.stores[0].names
        for store in self.stores[1:]:
            odd = sorted(set(self.names) ^ set(store.names))
            if odd:
                raise CheckpointError(f"{store.folder}: {odd[0]} has factors of one donor only; decompose all alike")

    @property
    def digest(self) -> str:
        """Fingerprint of all inputs of all donors, in order."""
        return hashlib.sha256(" ".join(store.digest for store in self.stores).encode()).hexdigest()[:32]

    def __getitem__(self, name: str) -> Factors:
        return join_donors([{name: store[name]} for store in self.stores])[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)


def open_store(folder: str | Path, *, training: bool = False) -> FactorStore | JoinedStore:
    """The factors in a folder, of as many donors as it holds; training: the bfloat16 copies where there are some."""
    stores = [FactorStore(folder, training=training)]
    while (inner := donor_folder(Path(folder), len(stores))).is_dir():
        stores.append(FactorStore(inner, training=training))
    return stores[0] if len(stores) == 1 else JoinedStore(stores)
