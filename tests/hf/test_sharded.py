"""Which rows a process reads, for groups that this process plays every member of; what groups compute with them is in
tests/distillation/test_distributed.py."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.testing._internal.distributed.fake_pg import FakeStore
from transformers import distributed, modeling_utils

from vlmgraft.checkpoint.index import open_checkpoint
from vlmgraft.errors import RecipeError
from vlmgraft.hf import sharded
from vlmgraft.hf.models import load_text_model, load_vlm
from vlmgraft.hf.modules import is_shard, is_sharded, text_model, unwrapped
from vlmgraft.hf.sharded import check_sharding, text_shards, vlm_shards

CPU = torch.device("cpu")
HERE = torch.accelerator.current_accelerator(check_available=True) or CPU


@contextmanager
def member(rank: int, world: int) -> Iterator[None]:
    """This process as one of a group whose others answer nothing: what is gathered from them is of the right shape."""
    torch.distributed.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world)
    try:
        yield
    finally:
        torch.distributed.destroy_process_group()


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, torch.Tensor]]:
    """What transformers reads from safetensors: the tensor's name and the part that came into memory."""
    seen: list[tuple[str, torch.Tensor]] = []
    real = modeling_utils.safe_open

    class Slice:
        def __init__(self, name: str, part: Any) -> None:
            self.name, self.part = name, part

        def __getattr__(self, key: str) -> Any:
            return getattr(self.part, key)

        def __getitem__(self, index: Any) -> torch.Tensor:
            seen.append((self.name, self.part[index]))
            return seen[-1][1]

    class File:
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            self.file = real(*args, **kwargs)

        def __getattr__(self, key: str) -> Any:
            return getattr(self.file, key)

        def __enter__(self) -> File:
            return self

        def __exit__(self, *_: object) -> None:
            pass

        def get_tensor(self, name: str) -> torch.Tensor:
            raise AssertionError(f"{name} is read whole")

        def get_slice(self, name: str) -> Slice:
            return Slice(name, self.file.get_slice(name))

    monkeypatch.setattr(modeling_utils, "safe_open", File)
    return seen


@pytest.mark.parametrize("world", [2, 3])
def test_the_rows_that_are_read_are_the_shards_and_nothing_is_read_twice(
    world: int, trio: Path, reads: list[tuple[str, torch.Tensor]]
) -> None:
    whole = dict(load_vlm(trio / "vlm", torch.float32).named_parameters())
    assert any(len(parameter) % world for parameter in whole.values()), "sizes that do not divide"
    reads.clear()
    for rank in range(world):
        with member(rank, world):
            model = vlm_shards(trio / "vlm", torch.float32, CPU)
            assert is_sharded(model) and not model.training
            layers = {id(parameter) for parameter in text_model(model).layers.parameters()}
            for name, parameter in model.named_parameters():
                assert is_shard(parameter) == (id(parameter) in layers) and parameter.shape == whole[name].shape
                if is_shard(parameter):
                    assert torch.equal(parameter.to_local(), whole[name].chunk(world)[rank]), name
            twin = unwrapped(model)
            for name, parameter in model.named_parameters():
                same = twin.get_parameter(name)
                assert same is not parameter
                assert not is_shard(same) or same.to_local().data_ptr() == parameter.to_local().data_ptr()
    read = sum(part.numel() for _, part in reads)
    assert read == sum(parameter.numel() for parameter in whole.values())


def test_what_is_tied_and_what_no_file_holds_is_as_in_the_whole_model(
    tmp_path: Path, reads: list[tuple[str, torch.Tensor]]
) -> None:
    from transformers import Qwen2Config, Qwen2ForCausalLM

    config = Qwen2Config(
        vocab_size=64, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, tie_word_embeddings=True,
    )  # fmt: skip
    Qwen2ForCausalLM(config).save_pretrained(tmp_path)
    whole = load_text_model(tmp_path, torch.bfloat16)
    reads.clear()
    with member(1, 3):
        model = text_shards(tmp_path, torch.bfloat16, CPU)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert [name for name, _ in reads].count("model.embed_tokens.weight") == 1
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    for name, buffer in whole.named_buffers():
        assert torch.equal(model.get_buffer(name), buffer), name


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda patch: patch.setattr(torch, "__version__", "2.7.1+cpu"), r"torch 2\.8 or newer, this is 2\.7\.1"),
        (lambda patch: patch.setattr(distributed.DistributedConfig, "__dataclass_fields__", {}), "transformers 5.23"),
        (lambda patch: patch.setitem(sys.modules, "transformers.distributed", None), "5.23 or newer, this is"),
        (lambda patch: patch.setattr(sharded, "find_spec", lambda name: None), "pip install accelerate"),
    ],
)
def test_libraries_that_do_not_shard_are_refused(change: Any, said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    change(monkeypatch)
    with pytest.raises(RecipeError, match=said):
        check_sharding(HERE)


def test_quantised_weights_are_refused(trio: Path) -> None:
    plain = open_checkpoint(trio / "vlm")
    check_sharding(HERE, plain)
    packed: Any = {"lm_head.weight": None}
    with pytest.raises(
        RecipeError, match=r"vlm: its weights are quantised, and are not read in shards; run one process"
    ):
        check_sharding(HERE, plain, replace(plain, packed=packed))


def test_another_device_than_the_groups_is_refused() -> None:
    with pytest.raises(RecipeError, match="shards models on this machine's"):
        check_sharding(torch.device("cuda" if HERE.type != "cuda" else "cpu"))
