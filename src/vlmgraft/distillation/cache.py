"""A teacher's answers and distributions on disk, one file per batch, named by a digest of everything they depend on.

Layout: `FOLDER/KEY/KIND-0007.safetensors`. A file is written under a temporary name, flushed and renamed, so a killed
run loses one batch at most. KEY changes with the teacher's weights and configs, its processor, the questions with their
images' bytes, and the settings, so no entry has to be invalidated. Old keys stay until the folder is removed. A token
at which the KL is taken needs about half a kilobyte; an image token needs its feature vector.

Under torch.distributed the batches are divided among the processes, which must see the same folder.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from vlmgraft.checkpoint.writer import save_tensors
from vlmgraft.distillation.distributed import shared
from vlmgraft.errors import OutputError
from vlmgraft.hf.modules import is_shard
from vlmgraft.storage.files import make_folder, scratch_folder, sweep_files
from vlmgraft.storage.resources import cannot_write
from vlmgraft.storage.torchrun import agreed, await_file, barrier, process

SAMPLES = 32
SAMPLE_BYTES = 4096
Unit = dict[str, Tensor]


@dataclass(frozen=True)
class UnitCache:
    """Cached units of work, one per batch, under one key; with `folder` None nothing is kept on disk."""

    folder: Path | None
    key: str

    def run(self, kind: str, count: int, make: Callable[[int], Unit]) -> Iterator[Unit]:
        """Yield units 0 to count − 1 in order: read from disk, or made and written if missing.

        Without a folder every process makes all units. With one, all processes make the same number of missing units:
        a forward pass with sharded weights needs every process. Raises OutputError when the folder cannot be written,
        or when a process does not see a file that another process wrote there.
        """
        if self.folder is None:
            yield from (make(index) for index in range(count))
            return
        rank, world = process()
        if world == 1:
            for index in range(count):
                unit = self._load(kind, index)
                yield self._keep(kind, index, make(index)) if unit is None else unit
            self._sweep()
            return
        missing = agreed(lambda: [index for index in range(count) if self._load(kind, index) is None])
        for index, counts in shared(missing):
            unit = make(index)
            if counts:
                self._keep(kind, index, unit)
        barrier()
        if rank == 0:
            self._sweep()
        for index in range(count):
            await_file(self._path(kind, index))
            unit = self._load(kind, index)
            if unit is None:
                raise OutputError(f"{self._path(kind, index)}: is not seen by process {rank}; let all share the folder")
            yield unit

    def remove(self) -> None:
        """Remove all units of the key."""
        if self.folder is not None:
            shutil.rmtree(self.folder / self.key, ignore_errors=True)

    def _path(self, kind: str, index: int) -> Path:
        assert self.folder is not None
        return self.folder / self.key / f"{kind}-{index:04d}.safetensors"

    def _load(self, kind: str, index: int) -> Unit | None:
        path = self._path(kind, index)
        try:
            return load_file(path) if path.is_file() else None
        except SafetensorError:  # damaged after it was written: treated as missing
            path.unlink(missing_ok=True)
            return None

    def _keep(self, kind: str, index: int, made: Unit) -> Unit:
        path = self._path(kind, index)
        unit = {name: tensor.detach().cpu().contiguous() for name, tensor in made.items()}
        try:
            make_folder(path.parent)
            save_tensors(unit, path)
        except OSError as error:
            raise cannot_write(path, error) from error
        return unit

    def _sweep(self) -> None:
        """Remove temporary files of killed runs, under all keys."""
        assert self.folder is not None
        for folder in self.folder.iterdir() if self.folder.is_dir() else ():
            if folder.is_dir():
                sweep_files(folder)


def digest(*parts: Any) -> str:
    """A short fingerprint of values with a faithful repr."""
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:20]


def teacher_digest(model: Any, processor: Any) -> str:
    """Fingerprint of a model in memory (configs, 32 samples of 4 KiB of every parameter) and of its processor's files.

    It does not depend on the folder's path. It depends on the version of transformers, which may change greedy answers.
    A sharded model has the fingerprint of the unsharded one: all processes gather its parameters, one at a time.
    """
    state = hashlib.sha256(transformers.__version__.encode())
    for config in (model.config, getattr(model, "generation_config", None)):
        if config is not None:
            fields = {key: value for key, value in config.to_dict().items() if key not in ("_name_or_path", "dtype")}
            state.update(repr(sorted(fields.items(), key=str)).encode())
    for name, parameter in model.named_parameters():
        state.update(repr((name, parameter.dtype, tuple(parameter.shape))).encode())
        state.update(_sample(parameter))
    state.update(_processor_files(processor))
    return state.hexdigest()[:20]


def _sample(tensor: Tensor) -> bytes:
    whole = tensor.full_tensor() if is_shard(tensor) else tensor
    flat = whole.detach().contiguous().reshape(-1).view(torch.uint8)
    if len(flat) > SAMPLES * SAMPLE_BYTES:
        step = (len(flat) - SAMPLE_BYTES) // (SAMPLES - 1)
        flat = flat.unfold(0, SAMPLE_BYTES, step).contiguous()
    return flat.cpu().numpy().tobytes()


def _processor_files(processor: Any) -> bytes:
    """Digest of the files that the processor saves: tokenizer, chat template, image settings."""
    with scratch_folder() as folder:
        processor.save_pretrained(folder)
        state = hashlib.sha256()
        for file in sorted(path for path in folder.rglob("*") if path.is_file()):
            data = file.read_bytes()
            if file.name == "tokenizer.json":  # it also records how the last batch was padded
                content = {
                    key: value for key, value in json.loads(data).items() if key not in ("padding", "truncation")
                }
                data = json.dumps(content).encode()
            state.update(file.name.encode() + hashlib.sha256(data).digest())
    return state.digest()
