"""Scores: reading answers, asking questions, intervals."""
