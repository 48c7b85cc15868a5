"""What was finally said: reasoning removed, then the strongest mark of an answer."""

from __future__ import annotations

import pytest
from hypothesis import given, strategies as st

from vlmgraft.evaluation.answers import final_answer, repeats
from vlmgraft.evaluation.answers.extract import evidence, first_clause, read_final


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("17", "17"),
        ("  red blue \n", "red blue"),
        ("<think> 4 + 5 = 9 </think> 9", "9"),
        ("<think> a </think> 1 <think> b </think> 2", "2"),
        ("4 + 5 = 9 </think> 9", "9"),  # the template opened the reasoning
        ("<think> 4 + 5 = 9 ; 9 +", ""),  # cut at the token limit
        ("<think> 4 </think>", ""),
        (r"so \boxed{12}", "12"),
        (r"first \boxed{3}, no, \boxed{4} it is", "4"),
        (r"<think> \boxed{3} </think> \boxed{5}", "5"),
        ("We add.\nAnswer: 21", "21"),
        ("answer: 3\nFinal answer: 4", "4"),
        ("The sum.\nThe end", "The sum.\nThe end"),
        (r"Answer: 3, or \boxed{4}", "4"),
        ("", ""),
    ],
)
def test_final_answer(text: str, expected: str) -> None:
    assert final_answer(text) == expected


@given(st.text(), st.text(alphabet=st.characters(blacklist_characters="\\<>:=", blacklist_categories=("Cs",))))
def test_reasoning_never_leaks_into_the_answer(thought: str, answer: str) -> None:
    if "answer" not in answer.lower():
        assert final_answer(f"<think>{thought}</think>{answer}") == answer.strip()


@pytest.mark.parametrize(("text", "loop"), [("a b c " * 20, True), ("so " * 30, True), ("one two three", False)])
def test_loops(text: str, loop: bool) -> None:
    assert repeats("first this, " + text) is loop


def test_a_long_text_without_a_loop_has_none() -> None:
    assert not repeats(" ".join(str(n) for n in range(500)))


@pytest.mark.parametrize(
    ("text", "content", "how"),
    [
        ("Answer: 3. In a box: \\boxed{4}", "4", "box"),
        ("<answer>5</answer> The answer is 6.", "5", "tag"),
        ('{"answer": ["3", "5"]}', '["3", "5"]', "tag"),
        ('{"answer": "a \\"b\\""}', 'a "b"', "tag"),
        ("We add.\nAnswer: 21", "21", "line"),
        ("So the answer is 7, because 3 + 4 = 7.", "7", "sentence"),
        ("seven", "seven", "text"),
        ("\\boxed{3}, \\boxed{5}", "3, 5", "box"),
        ("half of \\boxed{1", "", "none"),
        ("  ", "", "none"),
    ],
)
def test_the_strongest_mark_is_named(text: str, content: str, how: str) -> None:
    assert read_final(text) == (content, how)


@given(st.text(max_size=80))
def test_evidence_is_never_empty_and_comes_strongest_first(text: str) -> None:
    order = ["box", "tag", "line", "sentence", "text"]
    found = evidence(text)
    places = [order.index(how) for _, how in found]
    assert places == sorted(set(places)) and all(content.strip() for content, _ in found)


def test_a_clause_ends_where_its_reason_begins() -> None:
    assert first_clause("B because it is red") == "B"
    assert first_clause("3.5 cm. It is short") == "3.5 cm"
