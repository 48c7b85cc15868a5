"""The reference as Markdown, from the code: commands from the typer application, recipes from their JSON schema."""

from __future__ import annotations

import inspect
import json
import typing
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

SECTIONS = {
    "pipeline": "From recipes to checkpoints",
    "recipe": "From recipes to checkpoints",
    "checkpoint": "From recipes to checkpoints",
    "measure": "Measuring",
    "evaluation": "Measuring",
    "studies": "Looking inside",
    "report": "Looking inside",
    "tuning": "Fine-tuning",
    "training": "Fine-tuning",
    "lab": "The lab",
}
"""Headings of the Python reference, by the first part of a name's home."""
KINDS = {str: "text", Path: "path", int: "integer", float: "number", bool: "flag"}


def commands() -> str:
    """Every command: what it does, its usage, its arguments and options."""
    from typer.main import get_command

    from vlmgraft.cli import app

    return "\n\n".join(_command(name, command) for name, command in _walk(get_command(app), "vlmgraft"))


def _walk(group: Any, prefix: str) -> Iterator[tuple[str, Any]]:
    for name, command in group.commands.items():
        if hasattr(command, "commands"):
            yield from _walk(command, f"{prefix} {name}")
        else:
            yield f"{prefix} {name}", command


def _command(name: str, command: Any) -> str:
    hints = typing.get_type_hints(inspect.unwrap(command.callback))
    rows = [
        (_names(one), _kind(hints[one.name]), _default(one), _cell(one.help or ""))
        for one in command.params
        if one.name in hints
    ]
    usage = " ".join([name, *(f"<{one.name}>" for one in command.params if one.param_type_name == "argument")])
    table = _table(("argument or option", "type", "default", "what it is"), rows)
    return f"## {name}\n\n{(command.help or '').strip()}\n\n```text\n{usage} [options]\n```\n\n{table}"


def _names(one: Any) -> str:
    if one.param_type_name == "argument":
        return f"`{one.name}`"
    return ", ".join(f"`{name}`" for name in (*one.opts, *one.secondary_opts))


def _kind(hint: Any) -> str:
    """A parameter's type in words; a list may be given several times."""
    options = [one for one in (typing.get_args(hint) or (hint,)) if one is not type(None)]
    if typing.get_origin(hint) is list:
        return f"{KINDS[options[0]]}, several"
    return _kind(options[0]) if hint not in KINDS else KINDS[hint]


def _default(one: Any) -> str:
    if one.required:
        return "required"
    value = one.default() if callable(one.default) else one.default
    return "" if value in (None, False, (), []) or str(value) == "" else f"`{value}`"


def python() -> str:
    """Every public name, by where it lives, for mkdocstrings."""
    import vlmgraft

    parts: dict[str, list[str]] = {title: [] for title in (*SECTIONS.values(), "More")}
    for name in vlmgraft.__all__:
        home = vlmgraft._HOME.get(name, "vlmgraft.pipeline")
        parts[SECTIONS.get(home.split(".")[1], "More")].append(f"::: {home}.{name}")
    return "\n\n".join("\n\n".join([f"## {title}", *names]) for title, names in parts.items() if names)


def recipe() -> str:
    """The fields of a recipe, then one section per method."""
    from vlmgraft.methods import METHODS
    from vlmgraft.recipe import json_schema

    schema = json_schema()
    parts = [_fields(schema, schema), "## Methods"]
    for option in schema["properties"]["method"]["oneOf"][1:]:
        name = option["properties"]["name"]["const"]
        needs = ", ".join(f"`{need}`" for need in sorted(METHODS[name].needs)) or "neither `donor_base` nor `vlm_base`"
        modules = ", ".join(METHODS[name].default_modules)
        option = {**option, "required": [key for key in option["required"] if key != "name"]}
        told = f"{_cell(option['description'])} Needs {needs}. Merges {modules} unless `modules` says otherwise."
        parts.append(f"### {name}\n\n{told}\n\n{_fields(option, schema)}")
    return "\n\n".join(parts)


def tune() -> str:
    """The fields of a recipe of `vlmgraft tune`."""
    from vlmgraft.recipe.tune import TuneRecipe

    schema = TuneRecipe.model_json_schema()
    return _fields(schema, schema)


def _fields(schema: Mapping[str, Any], whole: Mapping[str, Any], prefix: str = "") -> str:
    return _table(("key", "type", "default", "what it is"), list(_rows(schema, whole, prefix)))


def _rows(schema: Mapping[str, Any], whole: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, ...]]:
    for name, field in schema["properties"].items():
        if "const" in field and name == "name":
            continue
        part = _part(field, whole)
        if part is not None and part.get("type") == "object" and "properties" in part and not _listed(field):
            yield f"`{prefix}{name}`", "mapping", "", _cell(field.get("description", part.get("description", "")))
            yield from _rows(part, whole, f"{prefix}{name}.")
            continue
        default = "required" if name in schema.get("required", ()) else _written(field)
        yield f"`{prefix}{name}`", _says(field, whole), default, _cell(field.get("description", ""))


def _part(field: Mapping[str, Any], whole: Mapping[str, Any]) -> Mapping[str, Any] | None:
    reference = field.get("$ref") or next((one["$ref"] for one in field.get("allOf", ()) if "$ref" in one), None)
    return whole["$defs"][reference.rpartition("/")[2]] if reference else None


def _listed(field: Mapping[str, Any]) -> bool:
    return field.get("type") == "array"


def _written(field: Mapping[str, Any]) -> str:
    value = field.get("default")
    return "" if value is None or value == {} or value == [] else f"`{json.dumps(value, ensure_ascii=False)}`"


def _says(field: Mapping[str, Any], whole: Mapping[str, Any]) -> str:
    """A JSON type in words."""
    if "oneOf" in field:
        return "name or mapping"
    if "anyOf" in field:
        return " or ".join(dict.fromkeys(_says(one, whole) for one in field["anyOf"] if one.get("type") != "null"))
    if "enum" in field or "const" in field:
        return ", ".join(f"`{value}`" for value in field.get("enum", [field.get("const")]))
    if "$ref" in field:
        return "mapping"
    if field["type"] == "array":
        if "prefixItems" in field:
            return f"{len(field['prefixItems'])} numbers, or lists or maps of them"
        return f"list of {_says(field['items'], whole)}"
    if field["type"] == "object":
        inner = field.get("additionalProperties")
        return f"map to {_says(inner, whole)}" if isinstance(inner, dict) else "mapping"
    return {"string": "text", "number": "number", "integer": "integer", "boolean": "true or false"}[field["type"]]


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(row) + " |" for row in lines)
