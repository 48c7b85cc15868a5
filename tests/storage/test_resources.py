"""Want of disk, memory and time becomes an error of ours; other errors stay what they are."""

from __future__ import annotations

import errno
import os
import resource
import signal
from pathlib import Path

import pytest
import torch

from vlmgraft.errors import OutputError, VlmgraftError
from vlmgraft.storage.resources import bounded, explained, free_memory, out_of_memory


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (MemoryError(), "out of memory while merging: lower this"),
        (
            RuntimeError("[enforce fail at alloc_cpu.cpp:119] . DefaultCPUAllocator: not enough memory: you tried"),
            "tried",
        ),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"), "lower this"),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"), "lower this .*CUDA"),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), "lower this"),
    ],
)
def test_memory_that_runs_out_is_named(error: Exception, said: str) -> None:
    with pytest.raises(VlmgraftError, match=said) as caught, out_of_memory("merging", "lower this"):
        raise error
    assert caught.value.exit_code == 1 and str(caught.value).startswith("out of memory while merging: lower this")


def test_other_errors_are_not_taken_for_memory() -> None:
    with pytest.raises(RuntimeError, match="shapes"), out_of_memory("merging", "lower this"):
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")


def test_a_full_disk_names_the_file_or_else_the_output(tmp_path: Path) -> None:
    for named in (str(tmp_path / "elsewhere"), None):
        with pytest.raises(OutputError, match=f"{named or tmp_path / 'out'}: .*No space.*make room"):  # noqa: SIM117
            with explained(tmp_path / "out"):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), named)


@pytest.mark.parametrize(("name", "ours"), [("out/file", True), (".out.partial-1/x", True), ("outer", False)])
def test_permissions_are_explained_for_the_output_only(name: str, ours: bool, tmp_path: Path) -> None:
    with pytest.raises(OutputError if ours else PermissionError), explained(tmp_path / "out"):
        raise PermissionError(errno.EACCES, "Permission denied", str(tmp_path / name))


def test_time_is_bounded_and_everything_is_as_before() -> None:
    handler, limits = signal.getsignal(signal.SIGVTALRM), resource.getrlimit(resource.RLIMIT_AS)
    with pytest.raises(TimeoutError, match=r"more than 0\.2 seconds"), bounded(0.2, 1 << 32):
        while True:
            pass
    assert signal.getsignal(signal.SIGVTALRM) is handler
    assert resource.getrlimit(resource.RLIMIT_AS) == limits and signal.getitimer(signal.ITIMER_VIRTUAL) == (0, 0)


def test_memory_is_bounded() -> None:
    with pytest.raises(MemoryError), bounded(60, 50_000_000):
        bytearray(200_000_000)


@pytest.mark.skipif(not Path("/proc/meminfo").is_file(), reason="Linux tells it")
def test_memory_of_cached_files_is_free() -> None:
    told = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    available = 1024 * int(told["MemAvailable"].split()[0])
    assert free_memory() == pytest.approx(available, rel=0.2)
