"""Where models go: as asked, else where there is a GPU."""

from __future__ import annotations

import pytest
import torch

from vlmgraft.errors import InputError
from vlmgraft.hf.placement import LARGE, default_device, default_dtype, learning_dtype, threads_of
from vlmgraft.spectral import threads


def test_what_is_asked_for_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLMGRAFT_DEVICE", "cpu")
    monkeypatch.setenv("VLMGRAFT_DTYPE", "float16")
    assert default_device() == torch.device("cpu")
    assert default_dtype(torch.device("cpu")) is torch.float16


def test_without_a_wish_the_device_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("VLMGRAFT_DEVICE", raising=False)
    monkeypatch.delenv("VLMGRAFT_DTYPE", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert default_device() == torch.device("cpu")
    assert default_dtype(torch.device("cpu")) is torch.float32
    assert default_dtype(torch.device("cuda", 0)) is torch.bfloat16


def test_gates_of_large_models_take_the_dtype_that_the_processor_multiplies(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("VLMGRAFT_DTYPE", raising=False)
    cpu = torch.device("cpu")
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True)  # alone, it is slower than float32
    for native in (True, False):
        monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda native=native: native)
        assert learning_dtype(cpu, LARGE, {"BF16"}) is (torch.bfloat16 if native else torch.float32)
        assert learning_dtype(cpu, LARGE - 1, {"BF16"}) is torch.float32
        assert learning_dtype(cpu, LARGE, {"BF16", "F32"}) is torch.float32  # bfloat16 would round what is finer
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: True)
    monkeypatch.setenv("VLMGRAFT_DTYPE", "float32")
    assert learning_dtype(cpu, LARGE, {"BF16"}) is torch.float32


def test_a_process_of_torchrun_takes_the_gpu_of_its_number(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("VLMGRAFT_DEVICE", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert default_device() == torch.device("cuda", 3)


@pytest.mark.parametrize(("variable", "value"), [("VLMGRAFT_DEVICE", "abacus"), ("VLMGRAFT_DTYPE", "int4")])
def test_what_cannot_be_used_is_named(monkeypatch: pytest.MonkeyPatch, variable: str, value: str) -> None:
    monkeypatch.setenv(variable, value)
    with pytest.raises(InputError, match=value):
        default_dtype(default_device())


@pytest.mark.parametrize(("width", "expected"), [(1000, 1), (2000, 2), (20_000, 3)])
def test_threads_are_of_all_parameters(width: int, expected: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two matrices and two biases: 2.0, 8.0 and 800 million parameters, on three cores."""
    given: list[int] = []
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(threads.torch, "get_num_threads", lambda: given[-1] if given else 3)
    monkeypatch.setattr(threads.torch, "set_num_threads", given.append)
    model = torch.nn.Sequential(*(torch.nn.Linear(width, width, device="meta") for _ in range(2)))
    with threads_of(model):
        assert given == [expected]
    assert given == [expected, 3]
