"""A recipe on the trio, with room for what it makes."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import yaml
from PIL import Image


class Place:
    """A folder with links to the trio, a recipe, and room for the output; a fault replaces a link by a broken copy."""

    def __init__(self, folder: Path, trio: Path, method: str) -> None:
        self.folder, self.out = folder, folder / "out" / "merged"
        self.out.parent.mkdir()
        for name in ("base", "vlm", "donor"):
            (folder / name).symlink_to(trio / name)
        self.recipe: dict[str, Any] = {
            "vlm": str(folder / "vlm"),
            "donor": str(folder / "donor"),
            "donor_base": str(folder / "base"),
            "method": {"name": method},
        }
        if method == "frism":
            Image.new("RGB", (128, 16)).save(folder / "grey.png")
            question = {"question": "read all glyphs", "image": "grey.png"}
            (folder / "calibration.jsonl").write_text((json.dumps(question) + "\n") * 4)
            calibration = {"data": str(folder / "calibration.jsonl"), "samples": 4, "max_new_tokens": 4}
            self.recipe["method"] |= {"steps": 0, "inject_weight": 0.1, "calibration": calibration}

    def copy(self, name: str, source: str | None = None) -> Path:
        """Replace the link `name` by a copy, of another model of the trio if `source` says so."""
        real = (self.folder / (source or name)).resolve()
        (self.folder / name).unlink()
        shutil.copytree(real, self.folder / name)
        return self.folder / name

    def write(self) -> Path:
        """The recipe file."""
        path = self.folder / "recipe.yaml"
        path.write_text(yaml.safe_dump(self.recipe))
        return path

    def files(self) -> dict[str, tuple[int, int] | None]:
        """Every path below the folder, hidden ones too; of files size and time of the last change."""
        found = [(path, path.stat()) for path in sorted(self.folder.rglob("*")) if path.name != "recipe.yaml"]
        return {str(path): None if path.is_dir() else (stat.st_size, stat.st_mtime_ns) for path, stat in found}

    def refused(self, vlmgraft: Any, more: list[str], parts: list[str]) -> str:
        """What a dry run prints that ends with code 2, names all `parts` in one fault, and writes nothing."""
        before = self.files()
        ran = vlmgraft("merge", self.write(), "-o", self.out, "--dry-run", *more)
        assert (ran.code, self.files()) == (2, before), ran.err
        fault = next(line for line in ran.err.splitlines() if line.startswith("vlmgraft: "))
        assert [part for part in parts if part not in fault] == [], ran.err
        return ran.out
