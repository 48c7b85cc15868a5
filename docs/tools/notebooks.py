"""Notebooks as pages of the site: code, and the outputs that are stored with it. A hook of mkdocs, without jupyter."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

NOTEBOOKS = Path(__file__).parents[1] / "notebooks"


def on_files(files: Files, config: Any) -> Files:
    """Add a page for every notebook, with its pictures; the notebook itself stays beside it, to be downloaded."""
    for path in sorted(NOTEBOOKS.glob("*.ipynb")):
        markdown, pictures = converted(path)
        files.append(File.generated(config, f"notebooks/{path.stem}.md", content=markdown))
        for name, content in pictures.items():
            files.append(File.generated(config, f"notebooks/{name}", content=content))
    return files


def converted(path: Path) -> tuple[str, dict[str, bytes]]:
    """The page in Markdown, and its pictures by name."""
    parts: list[str] = []
    pictures: dict[str, bytes] = {}
    for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            parts.append(source)
            continue
        parts.append(_block("python", source))
        for output in cell["outputs"]:
            data = output.get("data", {"text/plain": output.get("text", "")})
            if "image/png" in data:
                name = f"{path.stem}-{len(pictures) + 1}.png"
                pictures[name] = base64.b64decode("".join(data["image/png"]))
                parts.append(f"![What the cell above draws]({name})")
            elif "text/markdown" in data:
                parts.append("".join(data["text/markdown"]))
            else:
                parts.append(_block("text", "".join(data["text/plain"])))
    parts.insert(1, f"[Download this page as a notebook]({path.name})")
    return "\n\n".join(parts) + "\n", pictures


def _block(language: str, text: str) -> str:
    return f"```{language}\n{text.rstrip()}\n```"
