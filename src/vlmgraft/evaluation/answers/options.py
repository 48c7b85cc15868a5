"""Which lettered choice an answer picks: by letter, by the choice's value, or by its text. Pure, no torch."""

from __future__ import annotations

import re
from collections.abc import Sequence

from vlmgraft.data.choices import lettered, letters
from vlmgraft.evaluation.answers.quantities import read_quantity, same_quantity
from vlmgraft.evaluation.answers.text import key, squeeze, unwrap
from vlmgraft.evaluation.answers.values import NOT_THAT, mathematical, readings, same_value, sentences, stated_number

_LOOKALIKES = str.maketrans("АВСЕНасе", "ABCEHace")
"""Cyrillic letters that look like Latin ones."""
_WORD = r"(?:option|choice|answer|letter|figure|选项|選項|答案)"
_ONLY = re.compile(rf"(?:the )?(?:correct )?(?:{_WORD} ?(?:is)? ?:? ?)?[(\[{{]?([A-Za-z])[)\]}}]?[.:,)。]{{0,3}}", re.I)
_LEADING = re.compile(r"[(\[]?([A-Z])(?:[)\].:,：、]{1,3}(?![A-Za-z]\.)| - | ?\n| (?=(?:because|since) ))")
_NAMED = re.compile(rf"(?:\b|(?<=[^\W\d_]))(?i:{_WORD})s? ?(?:is|are|:|：|是|为|為)? ?[(\[]?([A-Z])(?![\w'’-])[)\]]?")
_CHOSEN = re.compile(
    r"\b(?i:hence|so|thus|therefore),? [(\[]?([A-Z])[)\]]?(?=[.,! ]*$)|"
    r"\b(?:choose|pick|select|go with|going with|mark) (?:option )?[(\[]?([A-Z])\b"
    r"|(?<![\w'-])[(\[]?([A-Z])[)\]]? (?:is|must be|would be|seems) (?:the )?(?:correct|right|true|answer|best)\b"
    r"|[选選擇择](?:项|項)?[ :：]?[(（]?([A-Z])"
)
_STANDING = re.compile(r"(?<![\w'-])(?:([B-HJ-Z])|([AI])(?!['’]| (?!is|because|as|since|or|and)[a-z]))(?![\w'’-])")
_PRONOUN = re.compile(r"\bI (?=(?:do|don['’]t|can|cannot|can['’]t|am|think|believe|see|will|would|have|was|could)\b)")
"""The pronoun "I", which is not option I."""
_NO_CHOICE = re.compile(r"\bnone of the (?:given |provided )?(?:options|choices|answers)\b|\bnot among\b", re.I)
_REASON = re.compile(r"\b(?:because|since|as|while|whereas|but|not)\b|[.;\n](?: |$)")
_DENIED = re.compile(
    r"\b(?:not|isn't|can't|cannot|neither|nor|rather than|instead of|except|wrong|incorrect|"
    r"others?|ruled out|eliminated|excluded)\b",
    re.I,
)
_SEVERAL = re.compile(r"[A-Za-z](?: ?(?:,|;|&|/|\band\b|，|、) ?(?:and )?[A-Za-z])+|[A-Z]{2,8}")
_HEDGE = re.compile(r"(?<!\w)\(?([A-Z])\)? ?(?:or|and|and/or|/|,|&) ?\(?([A-Z])\)?(?!\w)")
_HEADING = re.compile(r"(?:^|\n) ?(?:choices?|options?) ?: ?\n?|(?<=[ ?.:\n])choices? ?: ?", re.IGNORECASE)


def choices_within(question: str) -> tuple[str, ...]:
    """The choices that a question's text lists after "Choices:" or as lettered lines; () if it lists none."""
    heading = next(reversed(list(_HEADING.finditer(question))), None)
    text = question[heading.end() :] if heading else question
    return lettered(text) if heading or re.search(r"(?:^|\n)\(?A[.):]", question) else ()


def expected_letters(expected: str, choices: Sequence[str]) -> frozenset[str]:
    """The letters of an expected answer: of the choice with that text, if longer than one letter ("A and B"); else the
    letters that it names (capitals A to H if no choices are known); else of the choice with that one-letter text."""
    allowed = letters(len(choices) or 8)
    texts = [letter for letter, choice in zip(allowed, choices, strict=False) if key(choice) == key(expected) != ""]
    if texts and len(key(expected)) > 1:
        return frozenset(texts[:1])
    letter = "[A-Za-z]" if choices else "[A-H]"
    listed = re.fullmatch(rf"[\s(]*{letter}(?:[\s,;&().]+(?:and\s+)?{letter})*[\s).]*", expected[:100])
    named = frozenset(re.findall(r"[A-Z]", expected.upper().replace("AND", ""))) if listed else frozenset()
    return named if named and named <= set(allowed) else frozenset(texts[:1])


def pick(answer: str, choices: Sequence[str], count: int | None = None) -> str | None:
    """The letter that an answer picks, or None if it picks none or several.

    choices: the texts, if known; else `count` is the number of letters (default: eight). The first line is read first,
    unless it looks like working, then the last sentences from the end. In each of them, a letter at its beginning
    takes precedence over the words after it.
    """
    allowed = letters(len(choices) or count or 8)
    answer = squeeze(answer)
    lines = answer.split("\n")
    if len({line[:1] for line in lines if _LEADING.match(line)}) == len(lines) > 1:
        return None  # the choices themselves
    ends = sentences(answer)[-4:]
    if ends and _NO_CHOICE.search(ends[-1]) and not _LEADING.match(lines[0]) and choice_of(ends[-1], choices) is None:
        return None
    worked = "=" in lines[0] if len(lines) > 1 else len(ends) > 1 and not _LEADING.match(unwrap(lines[0]))
    for part in dict.fromkeys([*([] if worked else lines[:1]), *reversed(ends)]):
        letter = _pick_one(part, choices, allowed)
        if letter is not None:
            return letter or None
    return None


def _pick_one(answer: str, choices: Sequence[str], allowed: str) -> str | None:
    """The letter that one sentence picks; "" if it offers several, None if it offers none."""
    text = NOT_THAT.sub("", _PRONOUN.sub("", unwrap(answer)))
    if len(text.strip("()[]. :*")) == 1:
        text = text.translate(_LOOKALIKES)
    exact = choice_of(text, choices)
    if exact is not None and len(text.strip(" .()$")) > 1:
        return exact
    opening = _ONLY.fullmatch(text) or _LEADING.match(text)
    if opening and opening[1].upper() in allowed:
        return "" if _hedged(text, allowed) else opening[1].upper()
    if exact is not None:
        return exact
    chosen = _letters_by(_CHOSEN, text, allowed)
    affirmed = " ".join(
        part for part in re.split(r"(?<=[.;\n])\s|\b(?:but|whereas|while)\b|,", text) if not _DENIED.search(part)
    )
    named = chosen or _letters_by(_NAMED, affirmed, allowed)
    if named:
        return "" if len(named) > 1 or _hedged(affirmed, allowed) else named.pop()
    values = [(letter, read_quantity(choice)) for letter, choice in zip(allowed, choices, strict=False)]
    number = stated_number(text) if any(value for _, value in values) else None
    if number is not None:
        same = [letter for letter, value in values if value is not None and same_quantity(number, value)]
        return same[0] if len(same) == 1 else None
    for reading in readings(text)[1:] if choices else ():
        if (letter := choice_of(reading, choices)) is not None:
            return letter
    if (inside := _inside(affirmed, choices, allowed)) is not None:
        return inside
    standing = _letters_by(_STANDING, affirmed, allowed)
    return standing.pop() if len(standing) == 1 else None


def pick_several(answer: str, choices: Sequence[str]) -> frozenset[str]:
    """All letters that the answer picks, for questions with several right choices: "A, C", "A and C", "AC"."""
    allowed = letters(len(choices) or 8)
    answer = unwrap(answer[-2000:]).strip("().[]:* ")
    listed = _SEVERAL.search(answer)
    if listed:
        return frozenset(letter for letter in re.sub(r"\band\b", "", listed.group()).upper() if letter in allowed)
    letter = pick(answer, choices)
    return frozenset(letter) if letter else frozenset()


def choice_of(answer: str, choices: Sequence[str]) -> str | None:
    """The letter of the only choice with the answer's text or value; None without exactly one."""
    allowed = letters(len(choices))
    text = key(answer)
    same = [letter for letter, choice in zip(allowed, choices, strict=False) if key(choice) == text != ""]
    if not same and text and mathematical(text):
        same = [letter for letter, choice in zip(allowed, choices, strict=False) if same_value(answer, choice)]
    return same[0] if len(same) == 1 else None


def _letters_by(pattern: re.Pattern[str], text: str, allowed: str) -> set[str]:
    picked = {group.upper() for match in pattern.finditer(text) for group in match.groups() if group}
    return picked & set(allowed)


def _hedged(text: str, allowed: str) -> bool:
    """Whether a text offers two letters, as in `A or B`, before it gives a reason."""
    pair = _HEDGE.search(_REASON.split(text)[0])
    return bool(pair and pair[1] in allowed and pair[2] in allowed and pair[1] != pair[2])


def _inside(text: str, choices: Sequence[str], allowed: str) -> str | None:
    """The only choice that the sentence contains. A choice inside a longer contained choice does not count, nor do
    numbers and expressions, which are compared by value only."""
    text, keys = key(text), [key(choice) for choice in choices]
    present = [
        (letter, choice)
        for letter, choice in zip(allowed, keys, strict=False)
        if choice
        and not mathematical(choice)
        and re.search(rf"(?<!\w){re.escape(choice.removesuffix('s'))}s?(?!\w)", text)
    ]
    longest = [pair for pair in present if not any(pair[1] != longer and pair[1] in longer for _, longer in present)]
    return longest[0][0] if len(longest) == 1 else None
