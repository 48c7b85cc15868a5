"""Every block of code in README.md, CONTRIBUTING.md and docs/ does what it says, or says why it is not run."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.main import get_command

sys.path.insert(0, str(Path(__file__).parent))

import pages
import stage
from shell import Shell, options

from vlmgraft import cli
from vlmgraft.recipe.model import load_recipe
from vlmgraft.recipe.tune import load_tune_recipe
from vlmgraft.storage.jsonl import read_rows

SLOW = ("docs/tutorial.md",)
PAGES = pages.pages()
CHECKED = [page for page in PAGES if any(not one.told and one.language in pages.RUN for one in pages.blocks(page))]


def marked(page: Path) -> Any:
    name = pages.name(page)
    return pytest.param(page, id=name, marks=[pytest.mark.slow] if name in SLOW else [])


@pytest.mark.parametrize("page", PAGES, ids=pages.name)
def test_every_block_has_a_verdict(page: Path) -> None:
    for block in pages.blocks(page):
        known = block.told or block.language in (*pages.RUN, *pages.SHOWN)
        assert known, f"{block}: give it a language that is run ({', '.join(pages.RUN)}), or <!-- not run: WHY -->"
        assert "not run" not in block.marks or len(block.marks["not run"]) > 8, f"{block}: say why"


@pytest.mark.parametrize("page", [marked(page) for page in CHECKED])
def test_the_blocks_of_a_page_do_what_they_say(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("COLUMNS", "160")
    found = pages.blocks(page)
    prepare(tmp_path, found)
    shell, said = Shell(tmp_path), ""
    try:
        for block in found:
            if block.told or block.language in pages.SHOWN:
                continue
            if block.marks.get("with"):
                stage.STAGES[block.marks["with"]](tmp_path)
            changed = block.marks.get("run with", "")
            if block.language == "bash":
                shell.more = options(changed)
                code, said, err = shell.bash(block.text)
                assert code == 0, f"{block}: exit code {code}\n{said[-2000:]}\n{err[-4000:]}"
            elif block.language == "python":
                one, arrow, other = changed.partition(" -> ")
                assert bool(changed) == bool(arrow) and one in block.text, block
                said = shell.python(block.text.replace(one, other) if arrow else block.text, str(block))
            elif block.language == "output":
                compare(block, said)
            elif block.language == "jsonl":
                assert all(json.loads(line)["question"] for line in block.text.splitlines()), block
    finally:
        shell.close()
    if pages.name(page) in AFTER:
        AFTER[pages.name(page)](tmp_path)


def drift_was_logged(folder: Path) -> None:
    logged = list(read_rows(folder / "tuned" / "drift.jsonl"))
    assert len(logged) == 16 and all(0 < row["push"] < 1 for row in logged)
    assert (folder / "tuned-vlm" / "receipt.json").is_file()


AFTER = {"docs/drift.md": drift_was_logged}


@pytest.mark.parametrize("page", PAGES, ids=pages.name)
def test_commands_that_are_not_run_exist_with_their_options(page: Path) -> None:
    commands = get_command(cli.app)
    for block in pages.blocks(page):
        lines = block.text.replace("\\\n", " ").splitlines() if block.told and block.language == "bash" else []
        for line in lines:
            for words in re.findall(r"\bvlmgraft ((?:lab )?\w+)([^#&|;]*)", line):
                command: Any = commands
                for word in words[0].split():
                    command = command.commands[word]
                known = {name for one in command.params for name in one.opts}
                assert set(re.findall(r"(?<=\s)--[\w-]+", words[1])) <= known, f"{block}: {line}"


def prepare(folder: Path, found: list[pages.Block]) -> None:
    """The folder before the first block: models, questions, and the recipes of the page, wherever it shows them."""
    stage.models(folder)
    stage.questions(folder)
    if not any("save_traces(" in block.text for block in found):
        stage.traces(folder)
    if any(block.language == "bash" and "trio" in block.text and "ln -s" in block.text for block in found):
        (folder / "trio").unlink()
    for block in found:
        if block.language == "yaml" and not block.told:
            check_recipe(block)
            named = re.match(r"# (\S+\.yaml)\n", block.text)
            if named:
                (folder / named[1]).write_text(block.text)


def check_recipe(block: pages.Block) -> None:
    """A YAML block is a recipe of `merge` or of `tune`, and valid."""
    raw = yaml.safe_load(block.text)
    assert isinstance(raw, Mapping), block
    if "data" in raw:
        load_tune_recipe(raw)
    else:
        load_recipe(raw)


def compare(block: pages.Block, said: str) -> None:
    """The output that a page shows is the true one. … stands for anything in a line, alone for any lines."""
    pattern = "".join(
        r"(?:.*\n)*?" if line.strip() == "…" else re.escape(line).replace("…", ".*") + "\n"
        for line in block.text.splitlines()
    )
    if "about" not in block.marks:
        assert re.fullmatch(pattern, _plain(said)), f"{block}: shown\n{block.text}\nbut true is\n{said}"
        return
    number = re.compile(r"(?<![\w.])[-+]?\d[\d,]*(?:\.\d+)?(?:e-?\d+)?(?!\w)")
    loose = number.sub(lambda _: "(NUMBER)", block.text)
    pattern = "".join(
        r"(?:.*\n)*?"
        if line.strip() == "…"
        else re.escape(line).replace("…", ".*").replace(r"\(NUMBER\)", f"({number.pattern})") + "\n"
        for line in loose.splitlines()
    )
    match = re.fullmatch(pattern, _plain(said))
    assert match, f"{block}: shown\n{block.text}\nbut true is\n{said}"
    for shown, true in zip(number.findall(block.text), match.groups(), strict=True):
        one, other = float(shown.replace(",", "")), float(true.replace(",", ""))
        assert abs(one - other) <= max(3.0, 0.05 * abs(one)), f"{block}: {shown} is shown, {true} is true\n{said}"


def _plain(said: str) -> str:
    """Without the borders of tables and blanks at the ends of lines."""
    return "".join(line.rstrip() + "\n" for line in said.splitlines())
