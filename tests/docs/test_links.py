"""Links of README, CONTRIBUTING and docs lead somewhere. Those to other sites are checked for form, without network;
those inside the site, with their anchors, by `mkdocs build --strict` (see test_site.py)."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from urllib.parse import urlsplit

import pytest

sys.path.insert(0, str(Path(__file__).parent))

import pages

TEXTS = [*(pages.ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "SECURITY.md"))]
TEXTS += sorted((pages.ROOT / "docs").rglob("*.md"))
LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)")
ARXIV = re.compile(r"\b(?:arxiv\.org/abs/|arXiv:? ?)(\d{4}\.\d{4,5})\b", re.I)
KNOWN_SITES = {"arxiv.org", "github.com", "huggingface.co", "pypi.org", "semver.org"}


def prose(page: Path) -> str:
    """The page without its blocks of code."""
    return re.sub(r"^ *(`{3,})[^\n]*\n.*?^ *\1\s*$", "", page.read_text(encoding="utf-8"), flags=re.M | re.S)


def headings(page: Path) -> set[str]:
    """Anchors of a page, as GitHub and the site make them of its headings."""
    titles = re.findall(r"^#+ +(.+?)\s*$", prose(page), re.M)
    plain = (re.sub(r"\[([^\]]*)\]\([^)]*\)|[`*]", r"\1", title).lower() for title in titles)
    return {re.sub(r"\s", "-", re.sub(r"[^\w\s-]", "", title).strip()) for title in plain}


@pytest.mark.parametrize("page", TEXTS, ids=pages.name)
def test_links_inside_the_repository_lead_to_files_and_headings(page: Path) -> None:
    for link in LINK.findall(prose(page)):
        if re.match(r"[a-z]+:", link):
            continue
        place, _, anchor = link.partition("#")
        target = (page.parent / place).resolve() if place else page
        assert target.exists(), f"{pages.name(page)}: {link} leads nowhere"
        generated = "<!-- generate" in target.read_text(encoding="utf-8") if target.suffix == ".md" else True
        assert not anchor or generated or anchor in headings(target), f"{pages.name(page)}: {link} names no heading"


@pytest.mark.parametrize("page", TEXTS, ids=pages.name)
def test_files_of_ours_that_a_page_names_are_there(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    named = re.findall(r"\b(?:tests|src|benchmarks|experiments|docs)/[\w/.-]+\.(?:py|md|yaml|json)\b", text)
    made_there = "src/vlmgraft/methods/shrunk.py", "tests/methods/test_shrunk.py"  # by the reader of CONTRIBUTING
    assert [name for name in named if not (pages.ROOT / name).is_file() and name not in made_there] == []


@pytest.mark.parametrize("page", TEXTS, ids=pages.name)
def test_links_to_other_sites_are_of_a_known_form(page: Path) -> None:
    for link in re.findall(r"https?://[^\s)>\]\"'`]+", prose(page)):
        parts = urlsplit(link.rstrip(".,;"))
        assert parts.scheme == "https" and parts.hostname in KNOWN_SITES, f"{pages.name(page)}: {link}"
        if parts.hostname == "arxiv.org":
            assert re.fullmatch(r"/abs/\d{4}\.\d{4,5}", parts.path), link


@pytest.mark.parametrize("page", TEXTS, ids=pages.name)
def test_papers_are_those_that_the_code_cites(page: Path) -> None:
    """An identifier that is mistyped on a page is not in any docstring."""
    files = [path for place in ("src", "experiments") for path in (pages.ROOT / place).rglob("*.py")]
    code = "\n".join(path.read_text(encoding="utf-8") for path in files)
    known = set(ARXIV.findall(code)) | set(re.findall(r"\d{4}\.\d{5}", (pages.ROOT / "CITATION.cff").read_text()))
    assert set(ARXIV.findall(prose(page))) <= known


def test_a_shown_identifier_is_the_linked_one() -> None:
    for page in TEXTS:
        for shown, linked in re.findall(
            r"\[(?:arXiv )?(\d{4}\.\d{5})\]\(https://arxiv\.org/abs/([^)]+)\)", prose(page)
        ):
            assert shown == linked, f"{pages.name(page)}: {shown}"


def test_every_recipe_is_linked_from_the_papers() -> None:
    text = (pages.ROOT / "docs" / "papers.md").read_text(encoding="utf-8")
    assert set(re.findall(r"\.\./recipes/(\S+?\.yaml)", text)) == {p.name for p in (pages.ROOT / "recipes").glob("*")}
