"""Factors of a task vector: one object per matrix, and their store on disk.

A store is a folder with one safetensors file per matrix, named after the VLM tensor and written atomically: `U`, `s`
and `Vh` in float32, which the fold needs, and on request `U_train`, `Vh_train` in bfloat16, which is enough to train
gates and half the reading. Role, energy, error and the digest of the inputs are in each file's header. The manifest
`factors.json` is written last; what counts for resuming are the files themselves.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from safetensors import SafetensorError, safe_open
from torch import Tensor

from vlmgraft.checkpoint.digests import RECEIPT, FileReceipt, block_digests, joined, whole_text
from vlmgraft.checkpoint.header import is_name
from vlmgraft.checkpoint.reader import as_bytes
from vlmgraft.checkpoint.receipts import seal_receipt, tensor_file
from vlmgraft.checkpoint.saving import save_tensors
from vlmgraft.durable import sweep_files
from vlmgraft.errors import CheckpointError, DamagedError
from vlmgraft.folders import make_folder
from vlmgraft.records import json_text, read_json, write_json
from vlmgraft.spectral.stack import decompose_stack
from vlmgraft.spectral.svd import Rank, decompose_matrix

MANIFEST = "factors.json"
SUFFIX = ".safetensors"


@dataclass(frozen=True)
class Factors:
    """τ ≈ U diag(s) Vh for one VLM tensor, a matrix; of fused experts, with a leading dimension [experts] everywhere.

    name: the VLM's tensor name on disk. role: its canonical name inside the text model ("layers.3.mlp.up_proj.weight").
    energy: ‖τ‖_F², also of what a truncation dropped. error: relative residual found by random probes, the largest one
    of the experts. route: which algorithm made them (see svd.py); not for comparing.
    """

    name: str
    role: str
    U: Float[Tensor, "*experts out r"]
    s: Float[Tensor, "*experts r"]
    Vh: Float[Tensor, "*experts r in"]
    energy: float
    error: float
    route: str = ""

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of τ."""
        return (*self.U.shape[:-1], self.Vh.shape[-1])

    def update(self, spectrum: Float[Tensor, "*experts r"] | None = None) -> Float[Tensor, "*experts out in"]:
        """U diag(spectrum) Vh in float32; with the factors' own spectrum it is τ, up to truncation."""
        spectrum = self.s if spectrum is None else spectrum
        return (self.U.float() * spectrum.float().unsqueeze(-2)) @ self.Vh.float()

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Factors:
        """The same factors elsewhere: `dtype` applies to U and Vh only, singular values stay float32."""
        return replace(self, U=self.U.to(device, dtype), s=self.s.to(device), Vh=self.Vh.to(device, dtype))

    def shuffled(self, seed: int) -> Factors:
        """Negative control: the same spectrum on the same singular vectors, wrongly paired (Vh's rows permuted)."""
        order = torch.randperm(self.s.shape[-1], generator=torch.Generator().manual_seed(seed))
        return replace(self, Vh=self.Vh.index_select(-2, order.to(self.Vh.device)))


def factorize(tau: Float[Tensor, "*experts out in"], name: str, role: str, rank: Rank = "full") -> Factors:
    """Decompose one task vector, a matrix or fused experts; raises NumericalError naming the tensor."""
    result = (decompose_stack if tau.ndim == 3 else decompose_matrix)(tau, rank, name=name)
    return Factors(name, role, result.U, result.s, result.Vh, result.energy, result.error, result.route)


def join_donors(donors: Sequence[Mapping[str, Factors]]) -> dict[str, Factors]:
    """Factors of several donors side by side: U = [U₁ U₂ …], s and Vh likewise, for every tensor that any donor has.

    Every direction of every donor gets its own gate, and one training with one budget opens them together. The joint
    U and Vh are not orthogonal: everything that gates need holds, a LoRA of smaller rank is no longer the best one.
    """
    joined = {}
    for name in dict.fromkeys(name for donor in donors for name in donor):
        parts = [donor[name] for donor in donors if name in donor]
        shapes = {part.shape for part in parts}
        if len(shapes) > 1:
            raise CheckpointError(f"{name}: the donors' factors have shapes {sorted(shapes)}; they must be equal")
        joined[name] = Factors(
            name,
            parts[0].role,
            torch.cat([part.U for part in parts], dim=-1),
            torch.cat([part.s for part in parts], dim=-1),
            torch.cat([part.Vh for part in parts], dim=-2),
            sum(part.energy for part in parts),
            max(part.error for part in parts),
        )
    return joined


class FactorStore(Mapping[str, Factors]):
    """Factors on disk, read one matrix at a time: a mapping from VLM tensor names to `Factors`.

    training=True reads the bfloat16 copies of U and Vh where the store holds them.
    """

    def __init__(self, folder: str | Path, *, training: bool = False) -> None:
        self.folder = Path(folder)
        self.training = training
        self._read: tuple[tuple[int, int, int], dict[str, Any]] | None = None

    @property
    def names(self) -> list[str]:
        """Names in the order of the manifest; raises CheckpointError when the store is not complete."""
        return list(self.manifest["matrices"])

    @property
    def manifest(self) -> dict[str, Any]:
        """The content of factors.json; raises CheckpointError."""
        file = self.folder / MANIFEST
        try:
            stat = file.stat()
            version = stat.st_ino, stat.st_mtime_ns, stat.st_size
            if self._read is not None and self._read[0] == version:  # asked for every name
                return self._read[1]
            found = read_json(file)
            matrices = found.get("matrices")
            if not isinstance(matrices, dict) or not all(map(is_name, matrices)) or "digest" not in found:
                raise DamagedError(file, "it lacks the digest, or the names of matrices")
        except (OSError, DamagedError) as error:
            raise CheckpointError(
                f"{self.folder}: not a complete store of factors ({error}); run decompose, with --resume to go on"
            ) from error
        self._read = version, found
        return found

    @property
    def complete(self) -> bool:
        """Whether the manifest is there: it is written last."""
        return (self.folder / MANIFEST).is_file()

    @property
    def digest(self) -> str:
        """Fingerprint of all inputs; gates carry it, so that they are not folded with other factors."""
        return str(self.manifest["digest"])

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)

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
                stored, header = set(file.keys()), file.metadata()
                suffix = "_train" if self.training and "U_train" in stored else ""
                U, s, Vh = (file.get_tensor(key) for key in (f"U{suffix}", "s", f"Vh{suffix}"))
            if not U.shape[-1] == s.shape[-1] == Vh.shape[-2] or not U.ndim == Vh.ndim == s.ndim + 1:
                raise ValueError(f"U {list(U.shape)}, s {list(s.shape)} and Vh {list(Vh.shape)} do not fit")
            figures = float(header["energy"]), float(header["error"])
            return Factors(name, header["role"], U, s, Vh, *figures, header.get("route", ""))
        except (OSError, SafetensorError, ValueError, TypeError, LookupError) as error:
            raise CheckpointError(f"{path}: no factors of this matrix ({error}); run decompose --resume") from error

    def header(self, name: str) -> dict[str, str] | None:
        """The header of one matrix's file, or None when there is no file with a header of ours."""
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

    def save(self, factors: Factors, digest: str, *, train_copy: bool = False) -> None:
        """Write one matrix's file under a temporary name, flush it and rename it into place."""
        make_folder(self.folder)
        tensors = {"U": factors.U, "s": factors.s, "Vh": factors.Vh}
        tensors = {key: value.cpu().float().contiguous() for key, value in tensors.items()}
        if train_copy:
            tensors |= {f"{key}_train": tensors[key].bfloat16() for key in ("U", "Vh")}
        header = {"role": factors.role, "energy": repr(factors.energy), "error": repr(factors.error), "digest": digest}
        header["route"] = factors.route
        header["train_copy"] = "yes" if train_copy else "no"
        written = {key: joined(block_digests(as_bytes(value))) for key, value in tensors.items() if value.numel()}
        header["digests"] = json.dumps(written)
        path = self.folder / f"{factors.name}{SUFFIX}"
        save_tensors(tensors, path, header)

    def reopen(self) -> None:
        """Take manifest and receipt away: the store is being worked on."""
        for name in (MANIFEST, RECEIPT):
            (self.folder / name).unlink(missing_ok=True)

    def sweep(self) -> None:
        """Remove what killed runs left."""
        if self.folder.is_dir():
            sweep_files(self.folder)

    def finish(self, names: list[str], settings: Mapping[str, Any]) -> None:
        """Write the receipt and, last, the manifest of a complete store."""
        matrices, digests = {}, hashlib.sha256()
        files: list[FileReceipt] = []
        tensors: list[dict[str, Any]] = []
        for name in names:
            header = self.header(name)
            if header is None:
                raise CheckpointError(f"{self.folder}: {name} is missing; run decompose --resume")
            digests.update(f"{name} {header['digest']}\n".encode())
            matrices[name] = {"energy": float(header["energy"]), "error": float(header["error"])}
            file, rows = tensor_file(
                self.folder / f"{name}{SUFFIX}", self.folder, json.loads(header.get("digests", "{}"))
            )
            files.append(file)
            tensors += rows
        manifest = {"digest": digests.hexdigest()[:32], **settings, "matrices": matrices}
        files.append(whole_text(MANIFEST, json_text(manifest)))
        seal_receipt(self.folder, {"tensors": tensors, "files": [asdict(file) for file in files]})
        write_json(self.folder / MANIFEST, manifest)
