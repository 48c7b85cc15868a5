"""Durable files and folders: temporary names, flushes, renames, locks, JSON lines. Knows nothing of models."""
