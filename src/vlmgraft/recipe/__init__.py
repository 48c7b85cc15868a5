"""Recipes in YAML: validated, and resolved once into a frozen job."""
