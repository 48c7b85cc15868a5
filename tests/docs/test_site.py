"""The site builds without a warning and without network, and reads well in a browser at two widths."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urldefrag, urlsplit

import pytest

ROOT = Path(__file__).parents[2]
pytest.importorskip("mkdocs", reason="pip install 'vlmgraft[docs]'")


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The built site. `--strict`: a warning, such as an anchor that is not there, is an error."""
    folder = tmp_path_factory.mktemp("site")
    offline = {**os.environ, "NO_MKDOCS_2_WARNING": "1", "https_proxy": "http://127.0.0.1:9"}
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(folder)]
    built = subprocess.run(command, cwd=ROOT, env=offline, capture_output=True, text=True)
    assert built.returncode == 0, built.stdout + built.stderr
    return folder


class Page(HTMLParser):
    """Links and anchors of a page."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.links: list[str] = []
        self.loaded: list[str] = []
        self.anchors: set[str] = set()
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        self.anchors |= {str(given[key]) for key in ("id", "name") if given.get(key)}
        place = given.get("href") or given.get("src")
        if place and tag in ("script", "img", "link", "iframe"):
            self.loaded.append(place)
        elif place:
            self.links.append(place)


def test_every_link_of_the_site_leads_somewhere(site: Path) -> None:
    parsed = {path: Page(path) for path in site.rglob("*.html")}
    assert len(parsed) > 25
    for path, page in parsed.items():
        for link in {*page.links, *page.loaded}:
            if path.name == "404.html" or urlsplit(link).scheme:
                continue
            place, anchor = urldefrag(unquote(link))
            target = (path.parent / place).resolve() if place else path
            target = target / "index.html" if target.is_dir() else target
            assert target.is_file(), f"{path.relative_to(site)}: {link}"
            if anchor and target in parsed:
                assert anchor in parsed[target].anchors, f"{path.relative_to(site)}: {link}"


def test_nothing_is_loaded_from_elsewhere(site: Path) -> None:
    for path in site.rglob("*.html"):
        assert not [one for one in Page(path).loaded if re.match(r"(https?:)?//", one)], path
    for sheet in site.rglob("*.css"):
        assert not re.search(r"(@import|url\()\s*[\"']?(https?:)?//", sheet.read_text(encoding="utf-8")), sheet


def test_everything_that_is_generated_is_there(site: Path) -> None:
    from vlmgraft.cli import app
    from vlmgraft.methods import METHODS

    commands = (site / "reference" / "commands.html").read_text(encoding="utf-8")
    assert all(
        f"vlmgraft {command.callback.__name__.replace('_', ' ')}" in commands for command in app.registered_commands
    )
    recipe, formulas = (Page(site / "reference" / f"{name}.html").anchors for name in ("recipe", "methods"))
    assert set(METHODS) <= recipe and set(METHODS) <= formulas
    python = Page(site / "reference" / "python.html").anchors
    sys.path.insert(0, str(ROOT / "docs" / "tools"))
    from tables import homes as public_names

    homes = set(public_names())
    assert homes <= python, sorted(homes - python)


@pytest.mark.slow
def test_pages_fit_a_desk_and_a_phone_and_ask_the_network_for_nothing(browser: Any, site: Path) -> None:
    pages = [path for path in sorted(site.rglob("*.html")) if path.name != "404.html"]
    for width, scheme in ((1280, "light"), (390, "dark")):
        context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme, offline=True)
        tab, asked = context.new_page(), []
        tab.on("request", lambda request, asked=asked: asked.append(request.url))
        for page in pages:
            tab.goto(page.as_uri())
            assert tab.evaluate("document.documentElement.scrollWidth") <= width, page
            small = "[...document.querySelectorAll('article img')].filter(i => !i.naturalWidth || i.width < 200)"
            assert tab.evaluate(f"{small}.map(i => i.src)") == [], page
        assert not [one for one in asked if one.startswith("http")]
        context.close()
