"""What mkdocs does not do by itself: tables made from the code, and links that leave docs/ for other folders.

- `<!-- generate: NAME -->` becomes what the function in `GENERATED` gives, `<!-- include: FILE -->` a file.
- A link such as `../recipes/x.yaml` works in a checkout. In the site the file is a page of its own under `repository/`:
  Markdown as it is, other text as a code block, the rest as a file.
"""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path, PurePosixPath
from typing import Any

from mkdocs.structure.files import File, Files, InclusionLevel

sys.path.insert(0, str(Path(__file__).parent))

import tables

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
SHOWN = {".yaml": "yaml", ".py": "python", ".txt": "text", ".toml": "toml", ".sh": "bash"}
LINK = re.compile(r"(!?\[[^\]]*\]\()([^)\s#]+)((?:#[^)\s]*)?\))")
GENERATED = {
    "commands": tables.commands,
    "families": tables.families,
    "formulas": tables.formulas,
    "python": tables.python,
    "recipe": tables.recipe,
    "refused": tables.refused,
    "tune": tables.tune,
}


def on_files(files: Files, config: Any) -> Files:
    """Give every file outside docs/ that a page links, directly or through another such file, a place in the site."""
    pages = [(DOCS / file.src_uri) for file in files.documentation_pages()]
    seen: set[Path] = set()
    while pages:
        page = pages.pop()
        for target in outside(page, resolved(page.read_text(encoding="utf-8"))):
            if target not in seen:
                seen.add(target)
                files.append(_shown(target, config))
                if target.suffix == ".md":
                    pages.append(target)
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Fill in what is generated, and point links that leave docs/ at their place in the site."""
    here = PurePosixPath(page.file.src_uri)
    origin = ROOT / here.relative_to("repository") if here.parts[0] == "repository" else DOCS / here

    def moved(match: re.Match[str]) -> str:
        target = _target(origin, match[2])
        if target is None:
            return match[0]
        return f"{match[1]}{os.path.relpath(_place(target), here.parent)}{match[3]}"

    return LINK.sub(moved, resolved(markdown))


def resolved(markdown: str) -> str:
    """The page with everything that is included or generated."""
    included = re.sub(r"<!-- include: (\S+) -->", lambda match: (ROOT / match[1]).read_text(encoding="utf-8"), markdown)
    return re.sub(r"<!-- generate: (\S+) -->", lambda match: GENERATED[match[1]](), included)


def outside(page: Path, markdown: str) -> list[Path]:
    """Files of the repository outside docs/ that the page links."""
    found = (_target(page, match[2]) for match in LINK.finditer(markdown))
    return [target for target in found if target is not None and DOCS not in target.parents and target.is_file()]


def _target(page: Path, link: str) -> Path | None:
    """The file of the repository that a relative link means, if it is one."""
    if re.match(r"[a-z]+:", link) or link.startswith("/"):
        return None
    for start in (page.parent, ROOT):  # what is included has its links from the root
        target = Path(os.path.normpath(start / link))
        if target.is_file() and ROOT in target.parents:
            return target
    return None


def _place(target: Path) -> str:
    """Where a file of the repository is in the site, from the site's root."""
    if DOCS in target.parents:
        return target.relative_to(DOCS).as_posix()
    name = target.relative_to(ROOT).as_posix()
    return f"repository/{name}" + (".md" if target.suffix in SHOWN else "")


def _shown(target: Path, config: Any) -> File:
    name = target.relative_to(ROOT).as_posix()
    if target.suffix not in SHOWN:
        return File.generated(config, _place(target), abs_src_path=str(target), inclusion=InclusionLevel.NOT_IN_NAV)
    text = target.read_text(encoding="utf-8").rstrip()
    content = f"# {name}\n\n````{SHOWN[target.suffix]}\n{text}\n````\n"
    return File.generated(config, _place(target), content=content, inclusion=InclusionLevel.NOT_IN_NAV)
