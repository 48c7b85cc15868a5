"""Every module has a test file of its name, in the folder of its subpackage, that uses something of the module."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src" / "vlmgraft"
MODULES = sorted(path.relative_to(SOURCE) for path in SOURCE.rglob("*.py") if not path.name.startswith("_"))


def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def taken(tree: ast.Module) -> set[str]:
    """What a file imports of the package, and attributes of what it imports, dotted: `vlmgraft.storage.jsonl`."""
    known: dict[str, str] = {}
    found: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module:
            known |= {alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
            known |= {alias.asname or alias.name.split(".")[0]: alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "importorskip":
            found |= {one.value for one in node.args if isinstance(one, ast.Constant)}
    for node in ast.walk(tree):
        names: list[str] = []
        while isinstance(node, ast.Attribute):
            names, node = [node.attr, *names], node.value
        if names and isinstance(node, ast.Name) and node.id in known:
            found.add(".".join([known[node.id], *names]))
    return {name for name in (*found, *known.values()) if name.split(".")[0] == "vlmgraft"}


def defined(tree: ast.Module) -> Iterator[str]:
    """The public functions, classes and constants of a module."""
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            targets = [node.name]
        else:
            targets = [one.id for one in getattr(node, "targets", []) if isinstance(one, ast.Name)]
        yield from (name for name in targets if not name.startswith("_"))


def is_command(tree: ast.Module) -> bool:
    """Whether a module registers a command."""
    decorators = [one for node in tree.body if isinstance(node, ast.ClassDef) for one in node.decorator_list]
    return any(isinstance(one, ast.Call) and getattr(one.func, "id", "") == "command" for one in decorators)


def exercises(test: ast.Module, module: Path) -> bool:
    """Whether a test file takes something from a module: by its name, or what it defines from a package above it; of a
    command, whether it runs it by the fixture `vlmgraft`."""
    tree, dotted = parsed(SOURCE / module), ".".join(["vlmgraft", *module.with_suffix("").parts])
    if is_command(tree):
        texts = {node.value for node in ast.walk(test) if isinstance(node, ast.Constant)}
        return module.stem in texts and any(
            isinstance(one, ast.arg) and one.arg == "vlmgraft" for one in ast.walk(test)
        )
    packages = [dotted.rsplit(".", count)[0] for count in range(1, dotted.count(".") + 1)]
    own = {f"{package}.{name}" for package in packages for name in defined(tree)}
    return any(name == dotted or name.startswith(f"{dotted}.") or name in own for name in taken(test))


@pytest.mark.parametrize("module", MODULES, ids=str)
def test_every_module_has_a_test_file_of_its_name(module: Path) -> None:
    test = ROOT / "tests" / module.with_name(f"test_{module.name}")
    assert test.is_file(), f"{module} has no {test.relative_to(ROOT)}"
    assert exercises(parsed(test), module), f"{test.relative_to(ROOT)} uses nothing of {module}"


@pytest.mark.parametrize(
    ("text", "module", "found"),
    [
        ("from vlmgraft.storage.jsonl import read_rows", "storage/jsonl.py", True),
        ("from vlmgraft.storage import jsonl", "storage/jsonl.py", True),
        ("from vlmgraft.merging import merge_tensors", "merging/merge.py", True),
        ("import vlmgraft as vg\nvg.analysis.kl_divergence", "analysis/divergence.py", True),
        ("import vlmgraft as vg\nvg.analysis.kl_divergence", "analysis/scores.py", False),
        ("import pytest\npytest.importorskip('vlmgraft.merging.compiled')", "merging/compiled.py", True),
        ("from vlmgraft.storage.jsonl import read_rows", "storage/locks.py", False),
        ("import json\njson.loads", "storage/jsonl.py", False),
        ("def test(vlmgraft): vlmgraft('merge')", "cli/merge.py", True),
        ("def test(vlmgraft): vlmgraft('sweep')", "cli/merge.py", False),
        ("def test(run): run('merge')", "cli/merge.py", False),
        ("from vlmgraft.cli.merge import Merge", "cli/merge.py", False),
    ],
)
def test_the_check_above_would_notice(text: str, module: str, found: bool) -> None:
    assert exercises(ast.parse(text), Path(module)) is found
