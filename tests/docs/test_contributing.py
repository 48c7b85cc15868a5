"""CONTRIBUTING's "A method in six steps" and "A family in four", followed word for word in copies of the repository."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
COPIED = ("src", "tests", "docs", "recipes", "benchmarks", "experiments")
OF_THE_METHOD = ("tests/methods/test_shrunk.py", "tests/families/test_matrix.py", "-k", "shrunk")
OF_ALL_METHODS = (
    "tests/recipe/test_model.py",
    "tests/recipe/test_schema.py",
    "tests/docs/test_figures.py",
    "tests/docs/test_site.py",
)


OF_THE_FAMILY = ("tests/families", "-k", "vipllava")


def blocks(title: str) -> list[str]:
    """The Python blocks of a section."""
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    steps = text.split(f"## {title}", 1)[1].split("\n## ", 1)[0]
    return [textwrap.dedent(block) for block in re.findall(r"^ *```python\n(.*?)^ *```$", steps, re.S | re.M)]


def copy_to(folder: Path) -> None:
    """The repository without its history."""
    for name in COPIED:
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    for path in ROOT.glob("*.*"):
        if path.is_file():
            shutil.copyfile(path, folder / path.name)


def passes(folder: Path, *command: str) -> None:
    """Run a module in a copy."""
    environment = {**os.environ, "PYTHONPATH": f"{folder / 'src'}", "PYTHONDONTWRITEBYTECODE": "1"}
    ran = subprocess.run([sys.executable, "-m", *command], cwd=folder, env=environment, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stdout[-4000:] + ran.stderr[-2000:]


def test_where_is_names_files_that_exist() -> None:
    """Eight questions, each answered by at most three files."""
    table = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8").split("## Where is …", 1)[1].split("\n## ", 1)[0]
    answers = [re.findall(r"`([\w/.]+)`", row) for row in table.splitlines() if row.startswith("|") and "`" in row]
    assert len(answers) == 8 and all(1 <= len(files) <= 3 for files in answers)
    assert all((ROOT / file).is_file() for files in answers for file in files)


@pytest.mark.slow
def test_the_four_steps_leave_every_test_green(tmp_path: Path) -> None:
    copy_to(tmp_path)
    (case,) = blocks("A family in four steps")
    with (tmp_path / "tests/families/zoo.py").open("a") as file:
        file.write(f"\n\n{case}")
    passes(tmp_path, "ruff", "format", "--check", "tests/families")
    passes(tmp_path, "ruff", "check", "tests/families")
    passes(tmp_path, "pytest", "-q", "-n", "0", "-p", "no:cacheprovider", *OF_THE_FAMILY)


@pytest.mark.slow
def test_the_six_steps_leave_every_test_green(tmp_path: Path) -> None:
    copy_to(tmp_path)
    method, test, row = blocks("A method in six steps")
    (tmp_path / "src/vlmgraft/methods/shrunk.py").write_text(method)
    (tmp_path / "tests/methods/test_shrunk.py").write_text(test)
    registry = tmp_path / "src/vlmgraft/methods/__init__.py"
    text = registry.read_text().replace("        Curvature,\n", "        Curvature,\n        Shrunk,\n")
    line = "from vlmgraft.methods.slerp"
    registry.write_text(text.replace(line, f"from vlmgraft.methods.shrunk import Shrunk\n{line}", 1))
    with (tmp_path / "tests/families/naive.py").open("a") as file:
        file.write(f"\n\n{row}")
    for command in (
        ("ruff", "format", "--check", "src/vlmgraft/methods", "tests/methods", "tests/families"),
        ("ruff", "check", "src/vlmgraft/methods", "tests/methods", "tests/families"),
        ("pytest", "-q", "-n", "0", "-p", "no:cacheprovider", *OF_THE_METHOD),
        ("pytest", "-q", "-n", "0", "-p", "no:cacheprovider", *OF_ALL_METHODS),
    ):
        passes(tmp_path, *command)
