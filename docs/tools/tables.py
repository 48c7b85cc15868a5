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
    "distillation": "From recipes to checkpoints",
    "costs": "From recipes to checkpoints",
    "export": "From recipes to checkpoints",
    "evaluation": "Measuring",
    "analysis": "Looking inside",
    "report": "Looking inside",
    "finetuning": "Fine-tuning",
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
    parameters = inspect.signature(inspect.unwrap(command.callback)).parameters
    hints = {key: typing.get_args(parameter.annotation)[0] for key, parameter in parameters.items()}
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
    if typing.get_origin(hint) is typing.Literal:
        return ", ".join(f"`{value}`" for value in typing.get_args(hint))
    options = [one for one in (typing.get_args(hint) or (hint,)) if one is not type(None)]
    if typing.get_origin(hint) is list:
        return f"{KINDS[options[0]]}, several"
    return _kind(options[0]) if hint not in KINDS else KINDS[hint]


def _default(one: Any) -> str:
    if one.required:
        return "required"
    value = one.default() if callable(one.default) else one.default
    return "" if value in (None, False, (), []) or str(value) == "" else f"`{value}`"


def homes() -> list[str]:
    """The full name of every public function and class, those of `vlmgraft.analysis` after those of the package."""
    import vlmgraft
    from vlmgraft import analysis

    ours = [f"{vlmgraft._HOME[name]}.{name}" for name in vlmgraft.__all__ if name != "analysis"]
    return [*ours, *(f"vlmgraft.analysis.{analysis._HOME[name]}.{name}" for name in analysis.__all__)]


def python() -> str:
    """Every public name, by where it lives, for mkdocstrings."""
    parts: dict[str, list[str]] = {title: [] for title in (*SECTIONS.values(), "More")}
    for home in homes():
        parts[SECTIONS.get(home.split(".")[1], "More")].append(f"::: {home}")
    return "\n\n".join("\n\n".join([f"## {title}", *names]) for title, names in parts.items() if names)


def formulas() -> str:
    """The text at the head of every method's file, under its methods' names."""
    from vlmgraft.methods import METHODS

    shown: dict[str, str] = {}
    sections = []
    for name, cls in METHODS.items():
        first = shown.setdefault(cls.__module__, name)
        options = "{members: false, show_root_heading: false, show_root_toc_entry: false}"
        text = f"::: {cls.__module__}\n    options: {options}" if first == name else f"Under [{first}](#{first})."
        sections.append(f"## {name}\n\n{text}")
    return "\n\n".join(sections)


def recipe() -> str:
    """The fields of a recipe, then one section per method."""
    from vlmgraft.methods import METHODS
    from vlmgraft.recipe.schema import json_schema

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


def families() -> str:
    """Every VLM class of the results file with the donors that merge into it, and what else works with which."""
    rows = []
    for vlm, found in _swept().items():
        right = [row for row in found if row["state"] == "right"]
        if right:
            cells = [_donors(right, [row for row in right if row[key]]) for key in ("frism", "drift")]
            rows.append((f"`{vlm}`", ", ".join(dict.fromkeys(map(_donor, right))), *cells, right[0]["evaluated"]))
    return _table(("VLM class", "merges with", "FRISM", "DRIFT", "evaluated by"), rows)


def refused() -> str:
    """The rows of the results file that do not merge, with the reason that the command gives."""
    rows = []
    for vlm, found in _swept().items():
        for row in found:
            if row["state"] != "right":
                donor = "" if row["donor"] == "?" else _donor(row)
                rows.append(
                    (f"`{vlm}`", donor, row["state"], _cell(row.get("why", "").replace("donor /donor", "the donor")))
                )
    return _table(("VLM class", "donor", "", "why"), rows)


def _swept() -> dict[str, list[dict[str, Any]]]:
    """The rows of docs/reference/families.json by VLM class; its first entry is about the release."""
    file = Path(__file__).parents[1] / "reference" / "families.json"
    found: dict[str, list[dict[str, Any]]] = {}
    for row in json.loads(file.read_text(encoding="utf-8"))[1:]:
        found.setdefault(row["vlm"], []).append(row)
    return dict(sorted(found.items()))


def _donors(every: Sequence[Mapping[str, Any]], some: Sequence[Mapping[str, Any]]) -> str:
    """ "all", "none", or which of them."""
    return "all" if len(some) == len(every) else ", ".join(dict.fromkeys(map(_donor, some))) or "none"


def _donor(row: Mapping[str, Any]) -> str:
    return "itself" if row["donor"] == "itself" else f"`{row['donor']}`"


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
    reference = field.get("$ref") or next(
        (one["$ref"] for one in (*field.get("allOf", ()), *field.get("anyOf", ())) if "$ref" in one), None
    )
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
