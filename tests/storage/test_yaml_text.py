"""YAML from outside is plain: no tags, no growth, no key twice."""

from __future__ import annotations

import pytest

from vlmgraft.storage.yaml_text import parse_yaml


def test_plain_values() -> None:
    assert parse_yaml("a: 1\nb: [x, 2.5, null, true]\nc: &c {d: '<<'}\ne: *c") == {
        "a": 1,
        "b": ["x", 2.5, None, True],
        "c": {"d": "<<"},
        "e": {"d": "<<"},
    }


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("a: 1\nb:\n  c: 1\n  c: 2", "b.c stands in lines 3 and 4"),
        ("a: !!python/name:os.system", "python/name"),
        ("a: &a {x: 1}\nb: {<<: *a}", "merge keys"),
        ("[" * 40 + "]" * 40, "at most 32 levels"),
        ("a: &a x\nb: [" + ", ".join(["*a"] * 17) + "]", "more than 16 YAML aliases"),
        ("a: 0b_", "invalid literal"),
        ("a: [", "not YAML"),
        ("&a [*a]", "nested too deeply"),
        ("a: " + "9" * 5000, "digits"),
    ],
)
def test_what_is_refused(text: str, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        parse_yaml(text)
