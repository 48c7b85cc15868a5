"""The JSON schema of a recipe, with a description for every field; the documentation's tables are made from it."""

from __future__ import annotations

import ast
import inspect
import textwrap
from dataclasses import is_dataclass
from itertools import pairwise
from typing import Any

from pydantic import TypeAdapter

from vlmgraft.methods import METHODS
from vlmgraft.recipe.model import Recipe
from vlmgraft.recipe.source import nested


def json_schema() -> dict[str, Any]:
    """JSON schema of a recipe, one alternative per registered method."""
    schema = Recipe.model_json_schema()
    shared: dict[str, Any] = schema.setdefault("$defs", {})
    alternatives: list[dict[str, Any]] = [{"enum": list(METHODS)}]
    for name, cls in METHODS.items():
        adapter: TypeAdapter[Any] = TypeAdapter(cls)
        one = adapter.json_schema(ref_template="#/$defs/{model}")
        _describe(one, cls)
        parts = one.pop("$defs", {})
        for part in nested(cls).values():
            _describe(parts[part.__name__], part)
        shared.update(parts)
        properties = {"name": {"const": name}, **one.get("properties", {})}
        required = ["name", *one.get("required", [])]
        alternatives.append({**one, "properties": properties, "required": required, "additionalProperties": False})
    schema["properties"]["method"] = {"description": Recipe.model_fields["method"].description, "oneOf": alternatives}
    return schema


def field_docs(cls: type) -> dict[str, str]:
    """The docstrings below the fields of a class, by field; fields without one are absent."""
    body = ast.parse(textwrap.dedent(inspect.getsource(cls))).body[0].body  # type: ignore[attr-defined]
    return {
        node.target.id: inspect.cleandoc(after.value.value)
        for node, after in pairwise(body)
        if isinstance(node, ast.AnnAssign)
        and isinstance(node.target, ast.Name)
        and isinstance(after, ast.Expr)
        and isinstance(after.value, ast.Constant)
        and isinstance(after.value.value, str)
    }


def _describe(schema: dict[str, Any], cls: type) -> None:
    for parent in reversed([parent for parent in cls.__mro__ if is_dataclass(parent)]):
        for name, text in field_docs(parent).items():
            if name in schema["properties"]:
                schema["properties"][name]["description"] = text
