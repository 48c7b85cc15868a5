"""The command `lab path`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def test_lab_path_is_the_trio(trio: Path, vlmgraft: Any) -> None:
    assert Path(vlmgraft("lab", "path").out.strip()) == trio


def test_as_json_it_is_an_object(trio: Path, vlmgraft: Any) -> None:
    assert json.loads(vlmgraft("lab", "path", "--json").out) == {"path": str(trio)}


def test_the_group_alone_lists_its_commands(vlmgraft: Any) -> None:
    ran = vlmgraft("lab")
    assert ran.code == 2 and "path" in ran.err and ran.out == ""
