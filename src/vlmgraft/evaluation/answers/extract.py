"""The final answer of a generated text: reasoning is removed, then candidates are ranked by evidence. Pure, no torch.

Evidence of an answer, strongest first: the last closed box, an answer tag or JSON field, a line "Answer: …", a sentence
"the answer is …"; without any of them the whole text. Every scan is linear in the text's length.
"""

from __future__ import annotations

import json
import re

from vlmgraft.evaluation.answers.text import LONGEST, key, squeeze

_THOUGHT = "think|thinking|thought|reasoning|analysis|reflection"
_CLOSE = re.compile(rf"</(?:{_THOUGHT}) ?>|◁/think▷|<\|end_of_thought\|>", re.IGNORECASE)
_OPEN = re.compile(rf"<(?:{_THOUGHT}) ?>|◁think▷|<\|begin_of_thought\|>", re.IGNORECASE)
_BOX = re.compile(r"\\f?box(?:ed)? ?(?:\{|([0-9A-Z])(?!\w))")
_JOINED = re.compile(r"[\s$]{0,9}(?:,|and|or|, ?and|;)[\s$]{0,9}")
_PLACEHOLDER = re.compile(r"(?:(?:your|the|final|correct|option|answer|letter|here|number|value|text)[ _]?|[.…_-]+)*")
_TAGS = (
    ("<answer>", "</answer>"),
    ("<final_answer>", "</final_answer>"),
    ("<final>", "</final>"),
    ("<|begin_of_box|>", "<|end_of_box|>"),
    ("<|begin_of_solution|>", "<|end_of_solution|>"),
)
_SPECIAL = re.compile(r"<\|[\w/ ]{1,40}\|>|</?s>|\[/?INST\]")
_FIELD = re.compile(
    r"""["'](?:short[ _]|final[ _])?answer["'] ?: ?"""
    r"""(?:"((?:[^"\\]|\\.)*)"|'([^'\n]{1,200})'|(\[[^\]\n]{1,200}\]|[^"',}\n]{1,200}))""",
    re.IGNORECASE,
)
_ASIDES = ("reasoning", "explanation", "rationale", "steps", "confidence", "justification", "type")
"""Keys of a JSON answer that do not hold the answer itself."""
_CHOSEN = ("answer", "final_answer", "choice", "selected_choice", "option", "selected_option", "letter")
"""Keys that hold the answer in a JSON object of several values."""
_WORD = r"(?:answer|antwort|respuesta|réponse|risposta|resposta|ответ)"
_LINE = re.compile(
    rf"(?:\b{_WORD}|答案|答え)[*_]{{0,3}} ?(?:is|为|是|為)? ?[*_]{{0,3}}[:：=]{{1,2}}[*_]{{0,3}} ?", re.IGNORECASE
)
_HEAD = re.compile(rf"[#*_ ]{{0,9}}(?:the )?(?:final |correct )?{_WORD}[*_: ]{{0,9}}", re.IGNORECASE)
_HASHES = re.compile(r"#{3,6} ?([-+$€£]?\d[\d.,/% ]{0,40})")
_SENTENCE = re.compile(
    r"\b(?:the|my|correct|final|right|best|following)[*_]{0,2} (?:answer|option|choice|result|solution)[*_]{0,2}"
    r"(?: (?:here|therefore|thus|to (?:the|this) question|choice|option))? "
    r"(?:is|are|(?:would|must|should|will|has to) be|equals)(?! not\b)(?: therefore| thus| simply)?:? ?[*_]{0,3} ?"
    rf"|\b{_WORD} (?:is|ist|es|est|è|é)(?! not\b):? |答案(?:应该|应)?(?:是|为|為)|正[确確](?:的)?[选選][项項][是为為]"
    r"|[选選](?:[择擇])?(?=[ :：(（]{0,3}[A-Z])|(?:答え|正解)[はが]",
    re.IGNORECASE,
)
_END = re.compile(
    r"(?<!\bapprox)[.!?](?: |$)|[。！？\n]|; | [—–] |,? (?:because|since|so that|as it|which|where|as shown)\b"
    r"|, (?:at|with) (?=[\d$€£])|です|である|となります|になります",
    re.IGNORECASE,
)


def without_reasoning(text: str) -> str:
    """The text after the last `</think>` (or a similar tag); unclosed reasoning is removed."""
    closed = [match.end() for match in _CLOSE.finditer(text)]
    rest = text[closed[-1] :] if closed else text
    opened = _OPEN.search(rest)
    return rest[: opened.start()] if opened else rest


def evidence(text: str) -> list[tuple[str, str]]:
    """Candidate answers and how they were marked (box, tag, line, sentence, text), strongest first.

    Empty for a blank text, and if the text ends inside its last box, because that answer was cut.
    """
    rest = squeeze(without_reasoning(text)[-LONGEST:])
    boxed, cut = _last_box(rest)
    if cut:
        return []
    marked = [(boxed, "box"), (_tagged(rest), "tag")]
    rest = rest.strip()
    line, sentence = _last_line(rest), _behind_last(_SENTENCE, rest)
    marked += [(line, "line"), (first_clause(sentence), "sentence"), (rest, "text")]
    return [(content, how) for content, how in marked if content.strip()]


def read_final(text: str) -> tuple[str, str]:
    """The final answer and how it was marked: box, tag, line, sentence, text, or none."""
    return next(iter(evidence(text)), ("", "none"))


def final_answer(text: str) -> str:
    """The answer after the reasoning: the last box, else the answer tag, else the last line that begins with "Answer:",
    else "the answer is …", else the whole text. Unclosed reasoning is removed."""
    content, how = read_final(text)
    return _SPECIAL.sub("", without_reasoning(text)[-LONGEST:]).strip() if how == "text" else content


def first_clause(sentence: str) -> str:
    """The text up to the end of its first sentence, or to where a reason begins."""
    end = _END.search(sentence)
    return (sentence[: end.start()] if end and end.start() else sentence).strip()


def _last_box(text: str) -> tuple[str, bool]:
    """The content of the last closed box that is no placeholder (boxes joined by "and" or commas as a list), and
    whether the text ends inside a box. One pass over the braces."""
    starts = {match.end(): match for match in _BOX.finditer(text)}
    boxes = [(match.start(), end, match[1]) for end, match in starts.items() if match[1]]
    opened: list[int] = []
    for at, char in enumerate(text) if starts else ():
        if char in "{}" and text[at - 1 : at] != "\\":
            if char == "{":
                opened.append(at + 1)
            elif opened and (start := opened.pop()) in starts:
                boxes.append((starts[start].start(), at + 1, text[start:at]))
    boxes = [box for box in boxes if not _PLACEHOLDER.fullmatch(key(box[2][:100]))]
    outer: list[tuple[int, int, str]] = []
    for box in sorted(boxes, key=lambda box: (box[0], -box[1])):
        if not outer or box[0] >= outer[-1][1]:
            outer.append(box)
    unclosed = max((start for start in opened if start in starts), default=-1)
    if unclosed > (outer[-1][1] if outer else -1) and "\n" not in text[unclosed:]:
        return "", True
    run = outer[-1:]
    for box in reversed(outer[:-1]):
        if not _JOINED.fullmatch(text[box[1] : run[0][0]]):
            break
        run.insert(0, box)
    return ", ".join(_BOX.sub(lambda box: box[1] or "{", content) for *_, content in run).strip(), False


def _tagged(text: str) -> str:
    """The content of the last answer tag, or else of the last JSON field "answer"."""
    lower = text.lower()
    if len(lower) == len(text):
        for opening, closing in _TAGS:
            end = lower.rfind(closing)
            start = lower.rfind(opening, 0, end if end >= 0 else len(text))
            if start >= 0:
                return text[start + len(opening) : end if end > start else len(text)].strip()
    field = next((match for match in reversed(list(_FIELD.finditer(text)))), None)
    if field is None:
        return ""
    try:
        if (field[3] or "").startswith("{"):
            return _stated(json.JSONDecoder().raw_decode(text, field.start(3))[0])
        return str(json.loads(f'"{field[1]}"', strict=False)) if field[1] else (field[2] or field[3] or "").strip()
    except (ValueError, RecursionError):
        return field[1] or field[3]


def _stated(value: object) -> str:
    """The answer that a JSON value states. For an object: its chosen option, its only value, a value with its unit, or
    else "name = value" of each entry."""
    if not isinstance(value, dict):
        return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    parts = {name.casefold(): _stated(part) for name, part in value.items() if name.casefold() not in _ASIDES}
    if chosen := next((parts[name] for name in _CHOSEN if name in parts), ""):
        return chosen
    unit = next((parts.pop(name) for name in ("unit", "units") if name in parts and len(parts) == 2), "")
    if len(parts) > 1:
        return ", ".join(f"{name} = {part}" for name, part in parts.items())
    return " ".join([*parts.values(), unit]).strip()


def _last_line(text: str) -> str:
    """The content of the last line of the form "Answer: …", or the next line if it has none."""
    lines = text.split("\n")
    for at in reversed(range(len(lines))):
        hashes = _HASHES.fullmatch(lines[at])
        if hashes:
            return hashes[1]
        content = "" if _HEAD.fullmatch(lines[at]) else _behind_last(_LINE, lines[at])
        if content.strip("*_ :"):
            return content
        if _HEAD.fullmatch(lines[at]) and at + 1 < len(lines):
            return lines[at + 1]
    return ""


def _behind_last(pattern: re.Pattern[str], text: str) -> str:
    """The text after the last match up to the end of its line, or the next line if nothing follows."""
    end = next((match.end() for match in reversed(list(pattern.finditer(text)))), None)
    if end is None:
        return ""
    return text[end:].lstrip(" *_:\n").split("\n", 1)[0]


def repeats(text: str) -> bool:
    """Whether a text ends in a loop: the same 1 to 60 words at least four times, over 20 words or more."""
    words = text[-LONGEST:].split()[-600:]
    for period in range(1, 61):
        times = max(4, -(-20 // period))
        tail = words[-period * times :]
        if len(tail) == period * times and tail == tail[:period] * times:
            return True
    return False
