"""The schema of a recipe: every method, every option, a description for each."""

from __future__ import annotations

import json

import pytest
from sample_method import Sample

from vlmgraft.methods import METHODS
from vlmgraft.recipe.model import Output, Recipe
from vlmgraft.recipe.schema import field_docs, json_schema


@pytest.mark.usefixtures("sample")
def test_the_schema_lists_every_method_and_its_options() -> None:
    schema = json.loads(json.dumps(json_schema()))
    names = {one["properties"]["name"]["const"]: one for one in schema["properties"]["method"]["oneOf"][1:]}
    assert set(names) == set(METHODS)
    assert set(names["sample"]["properties"]) == {"name", "scale", "rule", "calibration"}
    assert set(schema["properties"]) == set(Recipe.model_fields)
    assert "Questions" in schema["$defs"] and schema["additionalProperties"] is False


class Documented(Sample):
    """Below two of its fields stands a text."""

    first: int = 1
    """Of the first,
    in two lines."""
    second: int = 2
    third: int = 3
    """Of the third."""


def test_the_text_below_a_field_is_its_description() -> None:
    assert field_docs(Documented) == {"first": "Of the first,\nin two lines.", "third": "Of the third."}


def test_every_field_and_option_is_described() -> None:
    schema = json_schema()
    methods = [one["properties"] for one in schema["properties"]["method"]["oneOf"][1:]]
    sections = [schema["properties"], schema["$defs"][Output.__name__]["properties"], *methods]
    silent = [
        name for fields in sections for name, one in fields.items() if name != "name" and "description" not in one
    ]
    assert silent == []
