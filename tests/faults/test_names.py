"""Nothing that is published or shown to others says where files lie on this machine, whatever command wrote it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from jobs import Job

OWN = ("run.json", "sweep.run.json", "sweep.recipes.json", "knockout.run.json", "ranks.run.json")
"""What a run goes on from names its inputs as they were given; nobody is sent it."""


def named(place: Path, *folders: Path) -> list[str]:
    """Files at or below a place that hold the name of one of the folders."""
    files = [place] if place.is_file() else [path for path in place.rglob("*") if path.is_file()]
    texts = [(path.name, path.read_bytes()) for path in files if path.name not in OWN]
    return [name for name, text in texts if any(str(folder).encode() in text for folder in folders)]


NAMES = ("merge", "frism", "tune", "gates", "front", "evaluate", "sweep", "knockout", "ranks", "export")


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name in ("merge", "export") else pytest.mark.slow) for name in NAMES]
)
def test_no_file_says_where_things_lie_and_json_is_one_object(
    name: str, small_jobs: dict[str, Callable[[Path], Job]], vlmgraft: Any, tmp_path: Path, trio: Path
) -> None:
    job = small_jobs[name](tmp_path)
    ran = vlmgraft(*job.arguments, "--json")
    assert ran.code == 0, ran.err
    assert isinstance(json.loads(ran.out), dict), "one JSON object is all of standard output"
    assert named(job.out, trio, tmp_path, Path(job.arguments[1]).parent) == []


def test_neither_does_a_report_of_paths_or_a_direction(
    small_jobs: dict[str, Callable[[Path], Job]], vlmgraft: Any, tmp_path: Path, trio: Path
) -> None:
    recipe, candidates = small_jobs["merge"](tmp_path).arguments[1], [f"--donor-base={trio / 'base'}"]
    candidates.append(f"--donor-base={trio / 'vlm'}")
    ran = vlmgraft("inspect", recipe, "--distances", *candidates, "-o", tmp_path / "inspect", "-q")
    assert ran.code == 0 and str(trio).encode() in (tmp_path / "inspect" / "inspection.json").read_bytes()
    (tmp_path / "inspect" / "recipe.yaml").write_bytes(Path(recipe).read_bytes())
    assert vlmgraft("report", tmp_path / "inspect", "-o", tmp_path / "page.html").code == 0
    (tmp_path / "asked.jsonl").write_text('{"question": "What is 2 + 3?"}\n')
    steer = ("steer", recipe, "--questions", tmp_path / "asked.jsonl", "--max-new-tokens", "2", "-q")
    assert vlmgraft(*steer, "-o", tmp_path / "steer.safetensors").code == 0
    for made in ("page.html", "steer.safetensors"):
        assert named(tmp_path / made, trio, tmp_path) == [], made
