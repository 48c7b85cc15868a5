"""Evaluation: asking questions, reading answers, scores with intervals."""
