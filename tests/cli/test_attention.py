"""The command `attention`: shares as FRANK's recipe takes them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

import vlmgraft as vg


def test_the_command_gives_what_frank_takes(trio: Path, tmp_path: Path, vlmgraft: Callable[..., Any]) -> None:
    ran = vlmgraft("attention", trio / "vlm", "--samples", 8, "--quiet")
    assert ran.code == 0, ran.err
    recipe = {"vlm": str(trio / "vlm"), "donor": str(trio / "donor")}
    recipe |= {"donor_base": str(trio / "base"), "vlm_base": str(trio / "base"), **yaml.safe_load(ran.out)}
    receipt = vg.merge(recipe, tmp_path / "merged")
    assert any("layer 3" in note for note in receipt.notes)
    shares = json.loads(vlmgraft("attention", trio / "vlm", "--samples", 8, "--quiet", "--json").out)
    assert yaml.safe_load(ran.out)["method"]["visual_attention"] == pytest.approx(shares["visual_attention"], rel=1e-3)
