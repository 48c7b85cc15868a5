"""What fits a device is chosen, and what does not is told."""

from __future__ import annotations

import re
from dataclasses import replace

from vlmgraft.costs.cost import Work
from vlmgraft.costs.device import H100
from vlmgraft.costs.fit import fitting
from vlmgraft.costs.models import MODELS
from vlmgraft.methods.curvature import Curvature
from vlmgraft.methods.frism import Frism

BY_NAME = {model.name: model for model in MODELS}


def test_what_fits_is_chosen_and_what_does_not_is_told() -> None:
    model, work, auto = BY_NAME["Qwen2.5-VL-7B"], Work(rank=128), Frism(rank=128, offload=False)
    large, small, tiny = (replace(H100, memory=size * 1e9) for size in (80, 40, 23))
    fits = fitting(model, work, large, auto)
    assert fits.fits and not fits.checkpointing and not fits.offload and fits.host == 0
    fits = fitting(model, work, small, auto)
    assert fits.fits and fits.checkpointing and fits.needed < 40 * 2**30, "the recipe as written fits a card of 40 GB"
    always = fitting(model, work, large, replace(auto, gradient_checkpointing=True))
    assert always.checkpointing, "as the recipe says"
    never = fitting(model, work, small, replace(auto, gradient_checkpointing=False))
    assert never.note.endswith("too much: set method.gradient_checkpointing: true")
    assert fitting(model, work, tiny, auto).note.endswith("too much: set method.offload: true")


def test_layers_wait_in_the_hosts_memory_where_nothing_else_fits() -> None:
    model, work, auto = BY_NAME["Qwen2.5-VL-32B"], Work(rank=64), Frism(rank=64)
    fit = fitting(model, work, H100, auto)
    assert fit.fits and fit.offload and fit.checkpointing and fit.needed < 20 * 2**30
    locked = 64 * (2 * 2**26 + 2 * 2**24 + 3 * 2**29)  # q, o; k, v; gate, up, down
    assert locked < fit.host < 1.02 * locked
    text = r"layers, offloaded \(else 7[12]\.\d GiB, over nine tenths of it\): 1\d\d\.\d GiB of host memory"
    assert re.search(text, fit.note), fit.note
    assert not fitting(model, work, replace(H100, is_gpu=False), auto).offload, "a CPU holds them anyway"
    asked = fitting(model, work, replace(H100, is_gpu=False), replace(auto, offload=True))
    assert asked.offload and "as the recipe says" in asked.note
    small = fitting(model, work, replace(H100, memory=14e9), auto)
    assert not small.fits and small.note.endswith("too much: set method.calibration.batch_size: 4")
    low = fitting(model, Work(rank="full"), replace(H100, memory=7.8e9), auto)
    assert low.note.endswith("batch_size: 1, method.rank: 256")
    assert "more GPUs" in fitting(model, work, replace(H100, memory=5e9), auto).note
    curvature = fitting(model, work, H100, Curvature(rank=64))
    assert curvature.fits and curvature.checkpointing and curvature.offload
