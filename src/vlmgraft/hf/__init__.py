"""Transformers models and processors: the only subpackage that loads them."""
