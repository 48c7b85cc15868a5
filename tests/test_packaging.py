"""What is said about the package: dependencies, version, citation, issue templates."""

from __future__ import annotations

import re
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import yaml

import vlmgraft as package

ROOT = Path(__file__).parents[1]
TEMPLATES = sorted((ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml"))


def wanted() -> dict[str, set[str]]:
    """Package → where pyproject.toml asks for it: core, or an extra."""
    tomllib = pytest.importorskip("tomllib")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    found: dict[str, set[str]] = {}
    for place, lines in {"core": project["dependencies"], **project["optional-dependencies"]}.items():
        for line in lines:
            found.setdefault(re.split(r"[\s<>=!~\[;]", line)[0], set()).add(place)
    return found


def test_every_dependency_has_its_row_and_every_row_its_dependency() -> None:
    rows = re.findall(r"^\| `(.+?)` \| (.+?) \| (.+?) \|$", (ROOT / "docs" / "dependencies.md").read_text(), re.M)
    assert len(rows) == len({name for name, _, _ in rows})
    assert {name: set(places.split(", ")) for name, places, _ in rows} == wanted()
    assert all(len(reason) > 5 for _, _, reason in rows)


def test_the_version_is_said_once(vlmgraft: Callable[..., Any]) -> None:
    assert re.fullmatch(r"\d+\.\d+\.\d+", package.__version__)
    ran = vlmgraft("--version")
    first, *others = ran.out.splitlines()
    assert (ran.code, first) == (0, f"vlmgraft {package.__version__}")
    assert [line.split()[0] for line in others] == ["python", "torch", "transformers"]
    assert f"torch {metadata.version('torch')}" in others
    assert f"\n## {package.__version__}" in (ROOT / "CHANGELOG.md").read_text()
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["version"] == package.__version__


def test_the_citation_has_what_its_format_wants() -> None:
    """Citation File Format 1.2.0: required keys, and of every reference; persons are named, entities have a name."""
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["cff-version"] == "1.2.0" and citation["license"] == "Apache-2.0"
    assert all(citation[key] for key in ("message", "title", "authors"))
    assert citation.get("type", "software") in ("software", "dataset")
    for entry in [citation, *citation["references"]]:
        assert entry["title"] and entry["authors"]
        for author in entry["authors"]:
            assert set(author) in ({"name"}, {"family-names", "given-names"}), author
    assert all(entry["type"] == "article" and entry["url"].startswith("https://") for entry in citation["references"])


@pytest.mark.parametrize("path", TEMPLATES, ids=lambda path: path.stem)
def test_an_issue_template_is_a_form(path: Path) -> None:
    form = yaml.safe_load(path.read_text())
    if path.name == "config.yml":
        assert set(form) <= {"blank_issues_enabled", "contact_links"}
        return
    assert form["name"] and form["description"]
    assert len({part["id"] for part in form["body"]}) == len(form["body"])
    for part in form["body"]:
        assert (
            part["type"] in ("textarea", "input", "checkboxes", "dropdown", "markdown") and part["attributes"]["label"]
        )


def test_a_bug_report_asks_for_receipt_inspect_and_versions() -> None:
    assert {path.stem for path in TEMPLATES} == {"bug", "method", "family", "config"}
    text = (ROOT / ".github" / "ISSUE_TEMPLATE" / "bug.yml").read_text()
    assert all(word in text for word in ("receipt.json", "vlmgraft inspect", "vlmgraft --version"))


def test_the_workflow_runs_what_developers_run() -> None:
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text())
    assert [step["run"] for step in workflow["jobs"]["all"]["steps"] if "run" in step] == [".ci/run"]
    assert (ROOT / ".ci" / "run").stat().st_mode & 0o100
