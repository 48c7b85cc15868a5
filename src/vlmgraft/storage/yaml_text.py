"""Untrusted YAML: no tags, no duplicate keys, and nothing that grows or nests without bound while it is read."""

from __future__ import annotations

import re
from typing import Any

import yaml

from vlmgraft.storage.limits import MAX_YAML_ALIASES, MAX_YAML_DEPTH

_OPENED = re.compile(rf"(?:[\[{{] ?){{{MAX_YAML_DEPTH + 1}}}")


def parse_yaml(text: str) -> Any:
    """The value of an untrusted YAML text; all YAML from outside is read by this function.

    Raises:
        ValueError: the problem: not YAML, a tag, a duplicate key, or more levels or aliases than a recipe needs.
    """
    try:
        _refuse_growth(text)
        _refuse_twice(yaml.compose(text, yaml.SafeLoader))
        return yaml.safe_load(text)
    except RecursionError:
        raise ValueError("nested too deeply") from None
    except (yaml.YAMLError, LookupError, TypeError, AttributeError, OverflowError) as error:
        # yaml raises Python's own errors for odd scalars (0b_, 2001-99-99, !!binary)
        raise ValueError(f"not YAML: {error!s:.300}") from None


def _refuse_growth(text: str) -> None:
    """Refuse text that needs exponential or quadratic time or memory; events come one by one, so this stops early."""
    if _OPENED.search(text):  # yaml looks a thousand characters ahead at every bracket
        raise ValueError(f"nested too deeply: at most {MAX_YAML_DEPTH} levels")
    aliases = depth = 0
    for event in yaml.parse(text, yaml.SafeLoader):
        aliases += isinstance(event, yaml.AliasEvent)
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if aliases > MAX_YAML_ALIASES:
            raise ValueError(f"more than {MAX_YAML_ALIASES} YAML aliases (*name): write the values out")
        if isinstance(event, yaml.ScalarEvent) and event.value == "<<" and event.implicit[0]:
            raise ValueError("merge keys (<<) are not read, they copy mappings into each other: write the values out")
        if depth > MAX_YAML_DEPTH:
            raise ValueError(f"nested too deeply: at most {MAX_YAML_DEPTH} levels")


def _refuse_twice(node: yaml.Node | None, prefix: str = "") -> None:
    """Refuse a mapping with a duplicate key: YAML readers silently keep the last one."""
    if isinstance(node, yaml.SequenceNode):
        for item in node.value:
            _refuse_twice(item, prefix)
    if not isinstance(node, yaml.MappingNode):
        return
    seen: dict[str, int] = {}
    for key, value in node.value:
        name, line = str(key.value), key.start_mark.line + 1
        if name in seen:
            raise ValueError(f"{prefix}{name:.120} stands in lines {seen[name]} and {line}; keep one of them")
        seen[name] = line
        _refuse_twice(value, f"{prefix}{name}.")
