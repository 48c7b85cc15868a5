"""Factors on disk: one store per donor, read one matrix at a time, and the stores of several donors joined.

A store is a folder with one safetensors file per matrix, named after the VLM tensor and written atomically: `U`, `s`
and `Vh` in float32, which the fold needs, and on request `U_train`, `Vh_train` in bfloat16, which suffice to train
gates and halve the reading. Role, energy, error and the digest of the inputs are in each file's header. The manifest
`factors.json` is written last; resuming depends on the matrix files alone. With several donors, the folder itself is
the first donor's store, and folders inside it are the stores of the others.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from vlmgraft.checkpoint.digests import (
    RECEIPT,
    FileReceipt,
    block_digests,
    joined,
    read_sources,
    seal_receipt,
    tensor_file,
    whole_text,
)
from vlmgraft.checkpoint.handles import as_bytes
from vlmgraft.checkpoint.header import is_name
from vlmgraft.checkpoint.writer import save_tensors
from vlmgraft.errors import CheckpointError, DamagedError
from vlmgraft.spectral.factors import Factors, join_donors
from vlmgraft.spectral.gates import Gates
from vlmgraft.storage.files import make_folder, sweep_files
from vlmgraft.storage.jsonl import json_text, read_json, write_json

MANIFEST = "factors.json"
SUFFIX = ".safetensors"


class Store(Mapping[str, Factors]):
    """Factors on disk, read one matrix at a time: a mapping from VLM tensor names to `Factors`."""

    stores: tuple[FactorStore, ...]
    """One per donor."""

    @property
    def names(self) -> list[str]:
        """Names in the order of the manifest; raises CheckpointError if the store is incomplete."""
        return list(self.stores[0].manifest["matrices"])

    @property
    def digest(self) -> str:
        """Fingerprint of all inputs; gates carry it, so that they are not folded with other factors."""
        digests = [str(store.manifest["digest"]) for store in self.stores]
        return digests[0] if len(digests) == 1 else hashlib.sha256(" ".join(digests).encode()).hexdigest()[:32]

    def energy(self, name: str) -> float:
        """‖τ‖_F² of one matrix from the manifest, Σ over the donors."""
        return sum(float(store.manifest["matrices"][name]["energy"]) for store in self.stores)

    @property
    def kept(self) -> float:
        """Share of Σ‖τ‖_F² of all donors inside the factors, 1 without truncation."""
        kept, whole = map(sum, zip(*(store.energies() for store in self.stores), strict=True))
        return kept / max(whole, 1e-300)

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)


class FactorStore(Store):
    """The factors of one donor. training=True reads the bfloat16 copies of U and Vh where the store holds them."""

    def __init__(self, folder: str | Path, *, training: bool = False) -> None:
        self.folder, self.training = Path(folder), training
        self.stores = (self,)
        self._read: tuple[tuple[int, int, int], dict[str, Any]] | None = None

    @property
    def manifest(self) -> dict[str, Any]:
        """The content of factors.json; raises CheckpointError."""
        file = self.folder / MANIFEST
        try:
            stat = file.stat()
            version = stat.st_ino, stat.st_mtime_ns, stat.st_size
            if self._read is not None and self._read[0] == version:  # cached: read for every name
                return self._read[1]
            manifest = read_json(file)
            matrices = manifest.get("matrices")
            if not isinstance(matrices, dict) or not all(map(is_name, matrices)) or "digest" not in manifest:
                raise DamagedError(file, "it lacks the digest, or the names of matrices")
        except (OSError, DamagedError) as error:
            raise CheckpointError(
                f"{self.folder}: not a complete store of factors ({error}); run decompose, with --resume to go on"
            ) from error
        self._read = version, manifest
        return manifest

    @property
    def complete(self) -> bool:
        """Whether the manifest exists, which is written last."""
        return (self.folder / MANIFEST).is_file()

    def energies(self) -> tuple[float, float]:
        """Σ‖τ‖_F² inside the factors, and in total; a file that does not record its share counts as complete."""
        rows = self.manifest["matrices"].values()
        return sum(row.get("kept", row["energy"]) for row in rows), sum(row["energy"] for row in rows)

    def __contains__(self, name: object) -> bool:
        return name in self.manifest["matrices"]

    def __getitem__(self, name: str) -> Factors:
        if not (self.folder / f"{name}{SUFFIX}").is_file():
            raise KeyError(name)
        return self.load(name)

    def load(self, name: str) -> Factors:
        """Factors of one matrix; raises CheckpointError when its file is missing or damaged."""
        path = self.folder / f"{name}{SUFFIX}"
        try:
            with safe_open(path, framework="pt") as file:
                stored, header = set(file.keys()), file.metadata() or {}
                suffix = "_train" if self.training and "U_train" in stored else ""
                U, s, Vh = (file.get_tensor(key) for key in (f"U{suffix}", "s", f"Vh{suffix}"))
            if not U.shape[-1] == s.shape[-1] == Vh.shape[-2] or not U.ndim == Vh.ndim == s.ndim + 1:
                raise ValueError(f"U {list(U.shape)}, s {list(s.shape)} and Vh {list(Vh.shape)} do not fit")
            role, energy, error = header["role"], float(header["energy"]), float(header["error"])
        except (OSError, SafetensorError, ValueError, LookupError) as fault:
            raise CheckpointError(f"{path}: no factors of this matrix ({fault}); run decompose --resume") from fault
        return Factors(name, role, U, s, Vh, energy, error, header.get("route", ""))

    def header(self, name: str) -> dict[str, str] | None:
        """The header of one matrix's file; None without a file, or without a valid header."""
        path = self.folder / f"{name}{SUFFIX}"
        if not path.is_file():
            return None
        try:
            with safe_open(path, framework="pt") as file:
                header = dict(file.metadata() or {})
            float(header["energy"]), float(header["error"])
        except (OSError, SafetensorError, KeyError, ValueError):
            return None
        return header if {"role", "digest"} <= header.keys() else None

    def sources(self) -> dict[str, dict[str, str]]:
        """Checkpoint → tensor → digest of the bytes that were read, from the receipt; {} without a receipt."""
        file = self.folder / RECEIPT
        return read_sources(read_json(file), file) if file.is_file() else {}

    def save(
        self,
        factors: Factors,
        digest: str,
        *,
        train_copy: bool = False,
        sources: Mapping[str, Mapping[str, str]] | None = None,
    ) -> None:
        """Write one matrix's file under a temporary name, flush it and rename it into place.

        sources: checkpoint → tensor → digest of what τ was made from.
        """
        make_folder(self.folder)
        tensors = {"U": factors.U, "s": factors.s, "Vh": factors.Vh}
        tensors = {key: value.cpu().float().contiguous() for key, value in tensors.items()}
        if train_copy:
            tensors |= {f"{key}_train": tensors[key].bfloat16() for key in ("U", "Vh")}
        header = {"role": factors.role, "energy": repr(factors.energy), "error": repr(factors.error), "digest": digest}
        header["route"] = factors.route
        header["kept"] = repr(float(factors.s.double().square().sum()))
        header["train_copy"] = "yes" if train_copy else "no"
        written = {key: joined(block_digests(as_bytes(value))) for key, value in tensors.items() if value.numel()}
        header["digests"] = json.dumps(written)
        header["sources"] = json.dumps(sources or {})
        path = self.folder / f"{factors.name}{SUFFIX}"
        save_tensors(tensors, path, header)

    def reopen(self) -> None:
        """Remove manifest and receipt, before the store is written."""
        for name in (MANIFEST, RECEIPT):
            (self.folder / name).unlink(missing_ok=True)

    def sweep(self) -> None:
        """Remove temporary files of killed runs."""
        if self.folder.is_dir():
            sweep_files(self.folder)

    def finish(self, names: list[str], settings: Mapping[str, Any]) -> None:
        """Write the receipt and, last, the manifest of a complete store."""
        matrices, digests = {}, hashlib.sha256()
        files: list[FileReceipt] = []
        tensors: list[dict[str, Any]] = []
        sources: dict[str, dict[str, str]] = {}
        for name in names:
            header = self.header(name)
            if header is None:
                raise CheckpointError(f"{self.folder}: {name} is missing; run decompose --resume")
            digests.update(f"{name} {header['digest']}\n".encode())
            matrices[name] = {key: float(header[key]) for key in ("energy", "kept", "error") if key in header}
            file, rows = tensor_file(
                self.folder / f"{name}{SUFFIX}", self.folder, json.loads(header.get("digests", "{}"))
            )
            files.append(file)
            tensors += rows
            for key, read in json.loads(header.get("sources", "{}")).items():
                sources.setdefault(key, {}).update(read)
        manifest = {"digest": digests.hexdigest()[:32], **settings, "matrices": matrices}
        files.append(whole_text(MANIFEST, json_text(manifest)))
        rows = [asdict(file) for file in files]
        seal_receipt(self.folder, {"tensors": tensors, "sources": sources, "files": rows})
        write_json(self.folder / MANIFEST, manifest)


def donor_folder(folder: Path, number: int) -> Path:
    """Folder of the factors of donor `number`, counted from 0."""
    return folder if number == 0 else folder / f"donor-{number + 1}"


class JoinedStore(Store):
    """The factors of several donors, joined (`join_donors`).

    Raises CheckpointError when the stores do not hold the same tensors.
    """

    def __init__(self, stores: Sequence[FactorStore]) -> None:
        self.stores = tuple(stores)
        for store in self.stores[1:]:
            unmatched = sorted(set(self.names) ^ set(store.names))
            if unmatched:
                raise CheckpointError(
                    f"{store.folder}: {unmatched[0]} has factors of one donor only; decompose all alike"
                )

    def __getitem__(self, name: str) -> Factors:
        return join_donors([{name: store[name]} for store in self.stores])[name]


def open_store(folder: str | Path, *, training: bool = False) -> Store:
    """The factors in a folder, of all its donors; training: use the bfloat16 copies if there are some."""
    stores = [FactorStore(folder, training=training)]
    while (inner := donor_folder(Path(folder), len(stores))).is_dir():
        stores.append(FactorStore(inner, training=training))
    return stores[0] if len(stores) == 1 else JoinedStore(stores)


def stored_digest(factors: Mapping[str, Factors]) -> str | None:
    """The digest of a store; None for factors in memory."""
    return factors.digest if isinstance(factors, Store) else None


def sources_of_factors(factors: Mapping[str, Factors]) -> dict[str, dict[str, str]]:
    """`FactorStore.sources` of a store, several donors as donor, donor-2 and so on; {} for factors in memory."""
    stores = factors.stores if isinstance(factors, Store) else ()
    return {
        key if number == 1 else f"{key}-{number}": read
        for number, store in enumerate(stores, 1)
        for key, read in store.sources().items()
    }


def check_gates(gates: Gates, factors: Mapping[str, Factors]) -> None:
    """Raise CheckpointError if gates were made for other factors than this store's; factors in memory pass."""
    digest = stored_digest(factors)
    if None not in (digest, gates.factors) and digest != gates.factors:
        folder = factors.folder if isinstance(factors, FactorStore) else "factors"
        raise CheckpointError(
            f"{folder}: the gates were made for factors {gates.factors}, these are {digest}; name those factors, or "
            "learn the gates again"
        )


def is_store_file(name: str) -> bool:
    """Whether a factor store may hold a file of this name: matrix, manifest, receipt, further donor, hidden file."""
    return name in (MANIFEST, RECEIPT) or name.endswith(SUFFIX) or name.startswith((".", "donor-"))
