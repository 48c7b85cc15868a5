"""Transformers models and processors: the only room that loads them."""
