"""The notebooks run from end to end, and what is stored in them is small, tidy and of the cells as they are."""

from __future__ import annotations

import importlib.util
from collections import Counter
from pathlib import Path
from types import ModuleType
from typing import Any

import nbformat
import pytest
import yaml
from typer.main import get_command

from vlmgraft.cli import app

ROOT = Path(__file__).parents[2]
TOOLS = ROOT / "docs" / "tools"


def tool(name: str) -> ModuleType:
    """A script of docs/tools."""
    spec = importlib.util.spec_from_file_location(name, TOOLS / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


RUN = tool("run_notebooks")
NOTEBOOKS = RUN.notebooks()
each = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def kinds(notebook: Any) -> list[Counter[str]]:
    """Of every code cell, how many outputs there are of each kind."""
    return [
        Counter(kind for output in cell.outputs for kind in output.get("data", {output.get("name"): ""}))
        for cell in notebook.cells
        if cell.cell_type == "code"
    ]


def test_there_are_four() -> None:
    assert [path.stem[0] for path in NOTEBOOKS] == ["1", "2", "3", "4"]


@each
def test_the_stored_outputs_are_those_of_the_cells_as_they_are(path: Path) -> None:
    """Who changes a cell runs the notebook again: `python docs/tools/run_notebooks.py`."""
    notebook = nbformat.read(path, 4)
    nbformat.validate(notebook)
    assert notebook.metadata["vlmgraft"]["cells"] == RUN.sources_digest(notebook)
    run = [cell for cell in notebook.cells if cell.cell_type == "code" and not RUN.skipped(cell)]
    assert [cell.execution_count for cell in run] == list(range(1, len(run) + 1))
    colab = path.stem == "4-colab"
    assert sum(kinds(notebook), Counter()).keys() == {"stdout", *(() if colab else ("image/png", "text/markdown"))}


@each
def test_a_notebook_is_small_and_says_nothing_of_the_machine(path: Path) -> None:
    text = path.read_text()
    assert len(text) < 250_000
    assert not any(word in text for word in ("/tmp/", "/home/", "/root/", str(Path.home()), "Traceback", '"stderr"'))


@each
def test_a_notebook_becomes_a_page(path: Path) -> None:
    pytest.importorskip("mkdocs")
    markdown, pictures = tool("notebooks").converted(path)
    notebook = nbformat.read(path, 4)
    assert markdown.startswith("# ") and markdown.count("```python") == len(kinds(notebook))
    assert len(pictures) == sum(kinds(notebook), Counter())["image/png"]
    assert all(content.startswith(b"\x89PNG") and f"({name})" in markdown for name, content in pictures.items())


def test_what_runs_on_colab_only_says_so_and_has_the_words_of_the_pages() -> None:
    """Of the cells that no test runs, the commands are parsed: every option exists; the donors are a recipe's."""
    notebook = nbformat.read(TOOLS.parent / "notebooks" / "4-colab.ipynb", 4)
    elsewhere = [number for number, cell in enumerate(notebook.cells) if RUN.skipped(cell)]
    assert len(elsewhere) == 3
    assert all("on colab only" in " ".join(notebook.cells[number - 1].source.lower().split()) for number in elsewhere)
    text = "\n".join(notebook.cells[number].source for number in elsewhere).replace("\\\n", " ")
    lines = [line.partition("|")[0].split() for line in text.splitlines() if line.startswith("vlmgraft ")]
    assert len(lines) == 5
    for _, name, *words in lines:
        get_command(app).commands[name].make_context(name, words)  # type: ignore[attr-defined]
    ready = yaml.safe_load((ROOT / "recipes" / "frism-qwen2.5-vl-3b-smallthinker.yaml").read_text())
    assert all(ready[key] in text for key in ("vlm", "donor", "donor_base"))


@pytest.mark.slow
@each
def test_a_notebook_runs(path: Path, tmp_path: Path) -> None:
    """Without an error, and with the same kinds of outputs as are stored; figures may differ."""
    notebook = RUN.executed(path, tmp_path)
    RUN.tidy(notebook)
    assert kinds(notebook) == kinds(nbformat.read(path, 4))
