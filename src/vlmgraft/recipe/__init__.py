"""YAML ↔ validated recipe: one definition that is the file format, the command line's options and their help."""

from __future__ import annotations

from vlmgraft.recipe.model import Output, Recipe, dump_recipe, load_recipe, save_recipe
from vlmgraft.recipe.schema import json_schema

__all__ = ["Output", "Recipe", "dump_recipe", "json_schema", "load_recipe", "save_recipe"]
