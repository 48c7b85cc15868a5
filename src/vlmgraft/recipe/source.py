"""What the recipes of merging and of fine-tuning share: YAML read safely, keys set from the command line, and errors
that name the file, the key and what to write.

A recipe that grows or nests while it is read is refused before it does.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from vlmgraft.checkpoint.files import open_regular
from vlmgraft.errors import CheckpointError, RecipeError
from vlmgraft.methods import METHODS
from vlmgraft.recipe.keys import nearest

LARGEST = 1_000_000
"""Bytes of a recipe."""
DEEPEST = 32
"""Levels of a recipe."""
ALIASES = 16
"""In a recipe, at most: nested aliases grow exponentially."""


@contextmanager
def naming(source: object) -> Iterator[None]:
    """Put the recipe's file before the errors of the block, unless they name it already."""
    try:
        yield
    except (RecipeError, CheckpointError) as error:
        if isinstance(source, Mapping) or str(source) in str(error):
            raise
        raise type(error)(f"{source}: {error}") from None


def read_mapping(source: str | Path | Mapping[str, Any]) -> dict[str, Any]:
    """The raw mapping of a recipe file or a mapping (copied)."""
    if isinstance(source, Mapping):
        return yaml.safe_load(yaml.safe_dump(_plain(source)))
    path = Path(source)
    try:
        with open_regular(path) as file:
            text = file.read(LARGEST + 1).decode("utf-8")
        if len(text) > LARGEST:
            raise RecipeError(f"{path}: has more than {LARGEST:,} bytes; a recipe is a page of YAML")
        _refuse_growth(text, path)
        raw = yaml.safe_load(text)
    except CheckpointError as error:
        raise RecipeError(f"{error}; give a recipe in YAML") from None
    except (RecursionError, UnicodeDecodeError):
        raise RecipeError(f"{path}: nested too deeply or not UTF-8; give a recipe in YAML") from None
    except OSError as error:
        raise RecipeError(f"{path}: cannot be read ({error.strerror}); give a recipe in YAML") from None
    except (yaml.YAMLError, ValueError, LookupError, TypeError, AttributeError, OverflowError) as error:
        # yaml reports its own mistakes over odd scalars (0b_, 2001-99-99, !!binary) as Python's errors
        raise RecipeError(f"{path}: not YAML: {error!s:.300}; give a recipe in YAML") from None
    if not isinstance(raw, dict):
        raise RecipeError(f"{path}: this is {type(raw).__name__}; a recipe is a mapping (vlm: …, donor: …, method: …)")
    return raw


def _refuse_growth(text: str, path: Path) -> None:
    """Refuse what takes exponential or quadratic time or memory; events come one by one, so this stops early."""
    aliases = depth = 0
    for event in yaml.parse(text, yaml.SafeLoader):
        aliases += isinstance(event, yaml.AliasEvent)
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if aliases > ALIASES:
            raise RecipeError(f"{path}: more than {ALIASES} YAML aliases (*name); write the values out")
        if depth > DEEPEST:
            raise RecipeError(f"{path}: nested too deeply; write a recipe in YAML, of at most {DEEPEST} levels")


def _plain(value: Any) -> Any:
    """Mappings and sequences as dicts and lists, paths as text; the rest as it is."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, Path) else value


def apply_override(raw: dict[str, Any], override: str) -> None:
    """Set one dotted key of the raw recipe from `key=value`."""
    key, equals, text = override.partition("=")
    if not equals or not key.strip():
        raise RecipeError(f"--set {override!r:.120}: write key=value, such as method.scale=0.5")
    *path, last = key.strip().split(".")
    try:
        value = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, LookupError, TypeError, AttributeError, OverflowError, RecursionError):
        raise RecipeError(
            f"--set {override!r:.120}: {text!r:.120} is not a YAML value; write a number, text or list"
        ) from None
    target = raw
    for step in path:
        if step == "method":
            target["method"] = with_name(target.get("method")) or {}
        inner = target.setdefault(step, {})
        if not isinstance(inner, dict):
            raise RecipeError(f"--set {override!r:.120}: {step} is {inner!r:.60}, not a mapping; write {step}=VALUE")
        target = inner
    target[last] = value


def with_name(method: Any) -> dict[str, Any] | None:
    """The method section as a mapping; a bare name stands for its defaults."""
    if method is None or isinstance(method, dict):
        return method
    if isinstance(method, str):
        return {"name": method}
    raise RecipeError(f"method: {method!r} is neither a name nor a mapping with a name; methods: {', '.join(METHODS)}")


def as_recipe_error(error: ValidationError, prefix: str, keys: Any) -> RecipeError:
    """Pydantic's complaints in our words: path, value, what is expected; the branches of a union become one line."""
    lines: dict[str, tuple[list[str], Any]] = {}
    found = error.errors(include_url=False)
    for item in found:
        same = [other for other in found if other["loc"][:1] == item["loc"][:1] and other["input"] == item["input"]]
        path = prefix + ".".join(str(step) for step in (item["loc"][:1] if len(same) > 1 else item["loc"]))
        if item["type"] == "extra_forbidden":
            lines[path] = [f"unknown key{nearest(str(item['loc'][-1]), keys)}"], None
        elif item["type"] in ("missing", "missing_argument"):
            lines[path] = ["missing; write it"], None
        else:
            lines.setdefault(path, ([], item["input"]))[0].append(item["msg"])
    said = (
        f"{path}: {' or '.join(dict.fromkeys(expected))}" + (f", got {value!r}" if value is not None else "")
        for path, (expected, value) in lines.items()
    )
    return RecipeError("; ".join(said))
