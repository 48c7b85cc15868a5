"""What value a text states, and whether two short answers are the same: texts, quantities, lists, expressions."""

from __future__ import annotations

import re
from fractions import Fraction

from vlmgraft.evaluation.answers.algebra import compare
from vlmgraft.evaluation.answers.extract import first_clause
from vlmgraft.evaluation.answers.quantities import (
    Quantity,
    leading_quantity,
    read_quantity,
    same_quantity,
    summed,
    without_name,
    without_unit,
)
from vlmgraft.evaluation.answers.text import closes_at_end, key, split_outside, unwrap

SENTENCES = 12
"""Number of sentences that are read, from the end of an unmarked answer."""
LONGEST_SENTENCE = 600
LONGEST_VALUE = 400
"""Maximum length of an expression or list in characters; longer ones are compared as texts only."""
_ARTICLE = re.compile(r"^(?:a|an|the) ")
_SENTENCE_END = re.compile(r"(?<=[.!?])(?<!approx\.) (?=[A-Z\\$(*\"'])|[\n。！？]")
_ANNOTATION = re.compile(r"<<[^<>]{0,80}>>")
_THEREFORE = re.compile(r"\b(?:so|thus|hence|therefore|which means|in total,)\b,?", re.IGNORECASE)
_COUNT = re.compile(
    r"\bthere (?:is|are|was|were|will be|would be)(?: |(?=n['’]t any\b))(?:only |exactly |a total of |still )?",
    re.IGNORECASE,
)
_NO = re.compile(r"^(?:none|(?:n['’]t|not) any)\b|^no (?=(?:[a-z]+ ){0,2}[a-z]+s\b(?! (?:that|doubts?)))")
_ASSERTS = re.compile(
    r"(?:\b(?:is|are|was|were|be|being|equals?|gives?|gets?|got|ha[sd]|have|contains?|shows?|reads?|says?|measures?|"
    r"lasts?|weighs?|travels at|starts at|ends at|"
    r"costs?|totals?|needs?|leaves?|makes?|takes?|yields?|becomes?|called|named|labell?ed|"
    r"(?<!times the )(?<!twice the )(?<!half the )"
    r"(?:value|total|score|area|length|measure|answer) of)\b|'s\b)(?! not\b)"
    r"|[=≈：为為是]|(?<![没沒])有|(?<!\d)(?<!\d ):(?!\d)|\\approx(?![a-z])",
    re.IGNORECASE,
)
_CONDITION = re.compile(r"\b(?:when|if|where|for|at|with|since|because|than) (?:\$|\\\()?\\?\w{1,6} ?$", re.IGNORECASE)
_DENIAL = re.compile(r"\b(?:not|never|no longer|cannot|neither)\b|n't\b", re.IGNORECASE)
NOT_THAT = re.compile(
    r"(?:, ?|\()(?:and |but )?not [^,.;()]{1,80}\)?|\bnot [^ ,]{1,40},? but "
    r"|,? ?\b(?:instead of|rather than) [^,.;()]{1,80}",
    re.IGNORECASE,
)
_NUMBER = re.compile(
    r"(?<![A-Za-z\d.^_{/])[-+]?(?:\d+ (?=\d+/\d))?(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+|/\d+)?"
    r"(?![A-Za-z\d^/π]|\.\d)(?: ?%)?"
)
_EITHER = re.compile(r"\b(?:between|either|maybe|perhaps|or|might|may|could)\b", re.IGNORECASE)
_LISTED = re.compile(r"\b(\w+) [a-z]+: ([^:]{1,200}\band\b[^:]{1,80})")
_ENDING = re.compile(r"\b(?:in|by|for|after|within) (\w+) [a-z]+[.!]?$")
_ASIDE = re.compile(r" \([^()]{1,80}\)$")
_BULLET = re.compile(r"^(?:[-*•]|\d+[.)]) ")
_STATES = re.compile(
    r"\b(?:there (?:is|are)|it (?:is|does)|i (?:can )?see|the (?:image|clip|video|picture|photo) (?:shows|contains)|"
    r"they are|(?:is|are) (?:visible|present|shown|true))\b"
)
_VERB = re.compile(r"\b(?:is|are|does|do|isn't|aren't|doesn't|don't)\b")
_UNSURE = re.compile(
    r"\bnot (?:sure|certain|clear|able)\b|\bunsure\b|\bcan(?:no|')t (?:see|tell|say|determine|answer)\b|don't know"
)
_CHINESE = {
    re.compile("^(?:是|对|對|正确)"): True,
    re.compile("^(?:否|不|错)|没有|沒有"): False,
    re.compile("有"): True,
}
_LISTING = re.compile(
    r" ?(?:, ?(?:and|or) |;|\n|\band\b|\bor\b|\\cup(?![a-z])|&|、|，|,(?!\d{3}(?!\d))|(?<=\d),(?= )) ?"
)
_MEMBER_NAME = re.compile(
    r"^[a-zA-Z](?:_?\{?\d\}?)?(?: ?=| ?\\in(?![a-z])| ?∈) ?|^[a-zA-Z ]{2,30}: ?|^[a-zA-Z ]{0,20}\b[Ss]et (?=\\?\{)"
)
_MATHEMATICAL = re.compile(r"\\[a-zA-Z]+|[\^_=+*/()<>√π|{}-]|\d")
_FUNCTIONS = re.compile(r"\\[a-zA-Z]+|\b(?:sin|cos|tan|sec|csc|cot|log|ln|exp|sqrt|pi|max|min|mod)\b")
_ARITHMETIC = re.compile(r"[( .]*\d[\d .,()]*(?:[-+*×÷][( ]*\d[\d .,()]*)+")
_INEQUALITY = re.compile(r"[<>≤≥]|\\(?:leq?|geq?|lt|gt)(?![a-z])")
_POINT = re.compile(r"(?<![\w)])[(\[][^()\[\]]{1,80},[^()\[\]]{1,80}[)\]]")


def stated_number(answer: str, *, marked: bool = False) -> Quantity | None:
    """The number that an answer states, None if it states none or several.

    A text that is a number states it, and so does a first sentence that is one (an explanation follows). Otherwise the
    last sentence that asserts a single number counts. marked: the text is the content of a box, not a sentence.
    """
    if (quantity := read_quantity(answer)) is not None:
        return quantity
    if marked:
        worked_out = "=" in answer and _items(answer) is None
        return read_quantity(_ANNOTATION.sub("", answer).rpartition("=")[2]) if worked_out else None
    parts = sentences(answer)
    counted = bool(parts and _COUNT.match(parts[0]))  # "There are 4 in total. Taking 3 away leaves 1."
    if len(parts) > 1 and not counted and (quantity := read_quantity(parts[0])) is not None:
        return quantity
    if len(parts) == 2 and not counted and re.match(r"\w+ [a-z]{3}", parts[0]):
        quantity = leading_quantity(parts[0])
        if quantity is not None:  # "Two bars are higher. They are red and blue."
            return quantity
    last = True
    for sentence in reversed(parts):
        quantity = _asserted(sentence, last=last)
        if quantity is not None:
            return quantity
        last = last and not re.search(r"\d", sentence)
    return None


def sentences(answer: str) -> list[str]:
    """The last sentences of a text, each bounded in length."""
    parts = _SENTENCE_END.split(answer[-SENTENCES * LONGEST_SENTENCE :])
    return [part[-LONGEST_SENTENCE:].strip() for part in parts if part and part.strip()][-SENTENCES:]


def _asserted(sentence: str, *, last: bool) -> Quantity | None:
    """The number that one sentence asserts: the whole sentence, a count after "there are", the number after the last
    verb or equals sign, a leading count, or, in the last sentence that has numbers, the only one."""
    text = NOT_THAT.sub("", unwrap(_ANNOTATION.sub("", sentence)))
    conclusion = next((part for part in reversed(_THEREFORE.split(text)) if re.search(r"\d", part)), text)
    quantity = read_quantity(conclusion) or read_quantity(first_clause(conclusion))
    if quantity is not None:
        return quantity
    numbers = _NUMBER.findall(conclusion)
    if _UNSURE.search(conclusion):
        return None
    if (
        len(numbers) == 2
        and _EITHER.search(conclusion)
        and re.search(rf"{re.escape(numbers[0])} ?(?:or|and|to) ", conclusion)
    ):
        return None
    count = _COUNT.search(conclusion)
    counted = conclusion[count.end() :] if count else ""
    if (quantity := leading_quantity(counted if numbers else _NO.sub("0 ", counted))) is not None:
        return quantity
    listed = _LISTED.search(conclusion)
    quantity = read_quantity(listed[1]) if listed else None
    if listed and quantity and quantity.value == len(_LISTING.split(listed[2])):  # "in two years: 2015 and 2016"
        return quantity
    for match in reversed(list(_ASSERTS.finditer(conclusion))):
        if match.group() == "=" and _CONDITION.search(conclusion[: match.start()]):
            continue
        quantity = leading_quantity(conclusion[match.end() :])
        if quantity is not None:
            return quantity
        if match.group() in "=≈":
            return None
    if re.match(r"(?:the )?\w+ [a-z]{3}", conclusion, re.IGNORECASE) and not re.search(r"\band \d", conclusion):
        quantity = leading_quantity(conclusion)
        if quantity is not None:
            return quantity
    ending = _ENDING.search(conclusion)
    if ending and (quantity := read_quantity(ending[1])) is not None:
        return quantity
    if numbers and (quantity := summed(conclusion[conclusion.index(numbers[0]) :])) is not None:
        return quantity
    unsaid = _DENIAL.search(conclusion) or _INEQUALITY.search(conclusion)
    if last and not unsaid and len({number.strip("+% ") for number in numbers}) == 1:
        return leading_quantity(conclusion[conclusion.index(numbers[0]) :]) or read_quantity(numbers[0])
    return None


def readings(answer: str) -> list[str]:
    """Short texts that an answer may mean, most literal first: the whole answer, its first line, its last sentence, the
    first clause of that, and the text after the last verb, colon or equals sign."""
    lines = answer.split("\n")
    ends = sentences(answer)
    last = ends[-1] if ends else ""
    clause = first_clause(NOT_THAT.sub("", last) if len(last.split()) > 2 else last)
    conclusion = _THEREFORE.split(clause)[-1]
    candidates = [answer, lines[0], last, clause, conclusion]
    if 1 < len(lines) <= 20 and all(len(line.split()) <= 6 for line in lines):
        candidates.append(", ".join(_BULLET.sub("", line) for line in lines))
    for reading in dict.fromkeys((clause, conclusion, last)):
        several = mathematical(reading) and _items(reading)  # "x = 2 or x = 3" does not say 3
        if not several and not _DENIAL.search(reading):
            behind = [reading[match.end() :] for match in list(_ASSERTS.finditer(reading))[-2:][::-1]]
            candidates += [form for text in behind for form in (text, without_name(text.strip()), _ASIDE.sub("", text))]
    spans = re.findall(r"\$([^$]+)\$|\\\(((?:(?!\\\)).)+)\\\)", clause)
    candidates += ["".join(span) for span in spans[-1:]]
    points = _POINT.findall(clause)
    candidates += points if len(points) == 1 and not _DENIAL.search(clause) else []
    candidates += [line for line in lines if _INEQUALITY.search(line) and mathematical(line)][-1:]
    return [text for text in dict.fromkeys(reading.strip(" $*") for reading in candidates) if text]


def same_value(answer: str, expected: str, precision: int | None = None) -> bool:
    """Whether two short answers are the same: as texts, as quantities, as lists, or as expressions."""
    given, target = (_ARTICLE.sub("", key(text)) for text in (answer, expected))
    if given == target:
        return bool(target)
    if max(len(given), len(target)) > LONGEST_VALUE:
        return False
    mine, wanted = read_quantity(answer), read_quantity(expected)
    if mine is not None and wanted is not None:
        return same_quantity(mine, wanted, precision)
    listed = _same_list(answer, expected, precision)
    if listed is not None:
        return listed
    return _same_expression(answer, expected, wanted, precision)


def yes_or_no(answer: str) -> bool | None:
    """Whether an answer says yes (True) or no (False); None if it says neither or both."""
    text = key(answer if len(answer) < 2000 else answer[:2000].rpartition(" ")[0])
    for pattern, stance in _CHINESE.items():
        if pattern.search(text):
            return stance
    first = re.match(
        r"(?:(?:that|it)(?:'s| is) )?(yes|yeah|yep|true|correct|right|definitely|certainly|no|nope|false|incorrect)\b",
        text,
    )
    if first:
        both = re.match(r"(?:yes|no) ?(?:/|or|and) ?(?:yes|no)\b", text)
        return None if both else first[1] not in ("no", "nope", "false", "incorrect")
    if _UNSURE.search(text):
        return None
    stances = set(re.findall(r"\b(yes|no)\b", re.sub(r"\bno (?=[a-z])", "none ", text)))
    if stances:
        return stances == {"yes"} if len(stances) == 1 else None
    denied = bool(re.search(r"\b(?:not|no|none|neither|without|false)\b|n't\b", text))
    if _STATES.search(text) or (denied and (_VERB.search(text) or len(text.split()) <= 3)):
        return not denied
    return None


def _items(text: str) -> tuple[list[str], str] | None:
    """The members of a list and its brackets ("" for none or braces: unordered); None for a single value."""
    text = _MEMBER_NAME.sub("", without_name(unwrap(text).strip(" .")))
    text = text.replace("\\{", "{").replace("\\}", "}")
    if match := re.fullmatch(r"(.{0,80}?)\\pm ?(.{1,80})", text):
        return [f"{match[1]}{sign}{match[2]}" for sign in (("+", "-") if match[1] else ("", "-"))], ""
    bracketed = bool(re.fullmatch(r"[(\[{].*[)\]}]", text)) and (
        closes_at_end(text) or text[0] + text[-1] in ("(]", "[)")
    )
    inner = text[1:-1] if bracketed else text
    parts = [_MEMBER_NAME.sub("", part) for part in split_outside(inner, _LISTING)]
    brackets = text[0] + text[-1] if bracketed else ""
    return (parts, "" if brackets == "{}" else brackets) if len(parts) > 1 or brackets == "[]" else None


def _same_list(answer: str, expected: str, precision: int | None) -> bool | None:
    """Compare lists member by member: in order and with equal brackets if a list has brackets, else in any order. None
    if neither is a list."""
    wanted, mine = _items(expected), _items(answer)
    given, target = (key(text).replace(" ", "") for text in (answer, expected))
    if wanted is None or mine is None:
        interval = {bool(_INEQUALITY.search(text)) for text in (answer, expected)} == {True, False}  # x > 3, (3, ∞)
        return None if interval or wanted is mine else given == target  # 100,200 and 100, 200
    (members, bracket), (targets, frame) = mine, wanted
    if len(members) != len(targets) or (bracket and frame and bracket != frame):
        return False
    if frame or bracket:
        return all(same_value(member, target, precision) for member, target in zip(members, targets, strict=True))
    left = list(members)
    for target in targets:
        match = next((member for member in left if same_value(member, target, precision)), None)
        if match is None:
            return False
        left.remove(match)
    return True


def mathematical(text: str) -> bool:
    """Whether a text has symbols or digits, but no words, whose letters algebra would multiply as variables."""
    return bool(_MATHEMATICAL.search(text)) and not re.search(r"[a-zA-Z]{3}", _FUNCTIONS.sub(" ", text))


def _same_expression(answer: str, expected: str, wanted: Quantity | None, precision: int | None) -> bool:
    """Whether answers are equal as expressions. Sums and products left unevaluated do not match a number."""
    degrees = "°" in unwrap(answer + expected) and "π" in (answer + expected).replace("\\pi", "π")
    given, target = (_expression(_radians(text) if degrees else text) for text in (answer, expected))
    if not (mathematical(given) and mathematical(target)):
        return False
    if wanted is not None and _ARITHMETIC.fullmatch(given):
        return False
    compared = compare(_typeset(given), _typeset(target))
    if compared.same or compared.value is None or wanted is None:
        return bool(compared.same)
    return same_quantity(Quantity(Fraction(compared.value)), wanted, precision)


def _expression(text: str) -> str:
    text = " ".join(unwrap(text).strip(" .*").replace("π", "\\pi ").replace("√", "\\sqrt ").split())
    return without_unit(re.sub(r"^[A-Za-z]{3}[A-Za-z ]{0,40} ?= ?|^= ?", "", text))


def _radians(text: str) -> str:
    """Convert angles in degrees to multiples of π, so that 90° equals π/2."""
    return unwrap(text).replace("°", " \\pi/180")


def _typeset(expression: str) -> str:
    expression = re.sub(r"(?:(?<!\\)\bsqrt|\\sqrt) ?\(([^()]*)\)", r"\\sqrt{\1}", expression)
    return re.sub(r"(?<!\\)\b(sqrt|pi|sin|cos|tan|log|ln|exp)\b", r"\\\1", expression)
