"""Every family's rows, as one process of three reads them, are rows of what transformers loads whole."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch.testing._internal.distributed.fake_pg import FakeStore
from zoo import CASES, Trio

from vlmgraft.errors import CheckpointError
from vlmgraft.hf.models import load_text_model, load_vlm
from vlmgraft.hf.modules import is_shard
from vlmgraft.hf.sharded import text_shards, vlm_shards

TURNED = "qwen3_vl_moe"
"""Experts that transformers turns only where a file's shape asks for it: of rows alone it cannot tell, and refuses."""


@pytest.mark.parametrize("case", [name for name, case in CASES.items() if case.loadable])
def test_a_process_has_its_rows_of_vlm_and_donor(case: str, trio: Callable[[str], Trio]) -> None:
    folders = trio(case)
    donor = folders.plain / "donor"
    for folder, whole, rows in ((folders.vlm, load_vlm, vlm_shards), (donor, load_text_model, text_shards)):
        expected = dict(whole(folder, torch.float32).named_parameters())
        torch.distributed.init_process_group("fake", store=FakeStore(), rank=1, world_size=3)
        try:
            if case == TURNED and whole is load_vlm:
                with pytest.raises(CheckpointError, match="cannot be loaded in shards"):
                    rows(folder, torch.float32, torch.device("cpu"))
                continue
            found = dict(rows(folder, torch.float32, torch.device("cpu")).named_parameters())
        finally:
            torch.distributed.destroy_process_group()
        assert found.keys() == expected.keys() and any(map(is_shard, found.values()))
        for name, parameter in found.items():
            assert parameter.shape == expected[name].shape, name
            if is_shard(parameter):
                assert torch.equal(parameter.to_local(), (*expected[name].chunk(3), expected[name][:0])[1]), name
