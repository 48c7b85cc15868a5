"""Names in the package: every class has its own, and none is made of words that only we would understand."""

from __future__ import annotations

import ast
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[1] / "src"
TREES = {path.relative_to(SOURCE): ast.parse(path.read_text()) for path in sorted(SOURCE.rglob("*.py"))}
PRIVATE = {"speaker", "told", "sight", "hands", "looking", "asked", "lane", "lanes"}
ON_DISK = {"not_asked"}
"""Fields of JSON files."""
NAMED_BY = ("id", "attr", "arg", "name", "asname", "rest")


def identifiers(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        yield from (name for field in NAMED_BY if isinstance(name := getattr(node, field, None), str))
        yield from node.names if isinstance(node, ast.Global | ast.Nonlocal) else ()


def private_names(tree: ast.AST) -> set[str]:
    """Identifiers with a private word in them, as a part of a_name or of AName."""
    parts = {name: re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+", name) for name in set(identifiers(tree)) - ON_DISK}
    return {name for name, words in parts.items() if PRIVATE & {word.lower() for word in words}}


def test_no_class_name_stands_twice() -> None:
    names = Counter(node.name for tree in TREES.values() for node in ast.walk(tree) if isinstance(node, ast.ClassDef))
    assert len(names) > 250
    assert not [name for name, count in names.items() if count > 1]


def test_no_identifier_is_a_private_word() -> None:
    assert not {str(path): names for path, tree in TREES.items() if (names := private_names(tree))}


@pytest.mark.parametrize(
    "code",
    [
        "told = 1",
        "class _Sight: pass",
        "def first_asked(): pass",
        "def f(*, lanes=()): pass",
        "job.asked",
        "f(looking=1)",
        "import hands as h",
        "from a import b as speaker",
        "def f():\n    global TOLD_BEFORE",
        "match x:\n    case {**asked}: pass",
    ],
)
def test_the_check_above_would_notice(code: str) -> None:
    assert private_names(ast.parse(code))


def test_words_that_only_contain_one_and_fields_on_disk_are_fine() -> None:
    assert not private_names(ast.parse("masked = unasked = plane = insight = on_hand = not_asked = multitasked = 0"))
