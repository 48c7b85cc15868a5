"""Run the notebooks and keep their outputs: `python docs/tools/run_notebooks.py [NAME…]`.

They are stored with the outputs of a true run, so that they can be read without running anything. What a run prints
on standard error is not kept, of rich outputs the richest form is, and the notebook's metadata name the code that was
run, so that a test finds code that was changed and not run again.
"""

from __future__ import annotations

import hashlib
import os
import re
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import nbformat
from nbclient import NotebookClient

HERE = Path(__file__).parents[1] / "notebooks"
SKIPPED = "skip-execution"
"""The tag of cells that run elsewhere only, by nbclient's name."""
RICHER = ("image/png", "text/markdown", "text/plain")


def notebooks() -> list[Path]:
    """In reading order."""
    return sorted(HERE.glob("*.ipynb"))


def skipped(cell: Any) -> bool:
    """Whether a cell is not run here."""
    return SKIPPED in cell.metadata.get("tags", [])


def sources_digest(notebook: Any) -> str:
    """A fingerprint of the code."""
    cells = "\0".join(cell.source for cell in notebook.cells if cell.cell_type == "code")
    return hashlib.sha256(cells.encode()).hexdigest()[:16]


def executed(path: Path, folder: Path) -> Any:
    """The notebook, run in `folder` on a fresh kernel; raises nbclient's CellExecutionError."""
    notebook = nbformat.read(path, 4)
    os.environ.update({"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1"})
    NotebookClient(notebook, timeout=600, kernel_name="python3", resources={"metadata": {"path": folder}}).execute()
    return notebook


def tidy(notebook: Any) -> None:
    """Outputs as they are stored."""
    for number, cell in enumerate(notebook.cells):
        cell.id = f"cell-{number}"
        if cell.cell_type != "code":
            continue
        cell.metadata = {"tags": [SKIPPED]} if skipped(cell) else {}
        cell.outputs = _joined(output for output in cell.outputs if output.get("name") != "stderr")
        for output in cell.outputs:
            if "text" in output:
                output.text = re.sub(r"\x1b\[[0-9;]*m", "", output.text)  # kernels ask commands for colours
            if "data" in output:
                kept = next(kind for kind in RICHER if kind in output.data)
                output.data, output.metadata = {kept: output.data[kept]}, {}
    notebook.metadata = {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
        "vlmgraft": {"cells": sources_digest(notebook)},
    }


def _joined(outputs: Iterable[Any]) -> list[Any]:
    """Text printed without another output in between as one: kernels send it in pieces, whenever they flush."""
    joined: list[Any] = []
    for output in outputs:
        if joined and output.output_type == joined[-1].output_type == "stream" and output.name == joined[-1].name:
            joined[-1].text += output.text
        else:
            joined.append(output)
    return joined


def main() -> None:
    """Run all, or those named."""
    for path in notebooks():
        if sys.argv[1:] and path.stem not in sys.argv[1:]:
            continue
        with tempfile.TemporaryDirectory() as folder:
            notebook = executed(path, Path(folder))
        tidy(notebook)
        nbformat.write(notebook, path)
        print(f"{path.name}: {path.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
