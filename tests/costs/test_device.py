"""The device that costs are reckoned for: this machine's cores at a rate measured in the dtype of the work."""

from __future__ import annotations

import pytest
import torch

from vlmgraft.costs.device import device_of, product_rate


def test_a_processor_is_reckoned_at_the_rate_of_its_products(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vlmgraft.costs.device.product_rate", lambda dtype: 7e9 if dtype is torch.bfloat16 else 2e9)
    cpu = torch.device("cpu")
    assert device_of(cpu).bf16 == 2e9 and device_of(cpu, torch.bfloat16).bf16 == 7e9
    monkeypatch.undo()
    assert 1e8 < product_rate(torch.float32) < 1e15
