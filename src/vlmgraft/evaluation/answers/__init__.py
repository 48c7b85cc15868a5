"""Reading a generated answer: extract the final answer and compare it with the expected one. No torch."""

from vlmgraft.evaluation.answers.extract import final_answer, read_final, repeats, without_reasoning
from vlmgraft.evaluation.answers.options import choices_within, expected_letters
from vlmgraft.evaluation.answers.verdict import Verdict, judge, same_answer, stated_answer

__all__ = [
    "Verdict",
    "choices_within",
    "expected_letters",
    "final_answer",
    "judge",
    "read_final",
    "repeats",
    "same_answer",
    "stated_answer",
    "without_reasoning",
]
