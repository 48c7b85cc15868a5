"""A model as judge in addition to the rules: an OpenAI-compatible endpoint (hosted, or a local vLLM server).

The judge sees question, reference and answer, and says whether the answer is right. Its verdicts are cached on disk.
The summary shows the judge's score and its agreement with the rules; the headline score remains that of the rules.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from vlmgraft.data.endpoint import Endpoint
from vlmgraft.errors import VlmgraftError
from vlmgraft.storage.jsonl import append_row, read_rows

if TYPE_CHECKING:
    from vlmgraft.evaluation.records import Record

PROMPT = """Does the answer below state the reference as its final result? Wording and form do not matter, values do.
Reply with one word: yes or no.

Question: {question}
Reference: {reference}
Answer: {answer}"""
LONGEST_ANSWER = 6_000
"""Number of characters, from the end of an answer, that the judge reads."""


@dataclass(frozen=True)
class Judge:
    """A judge's endpoint. The key, if one is needed, is read from the environment variable OPENAI_API_KEY.

    url: the endpoint's base, such as http://127.0.0.1:8000/v1. cache: a file of verdicts as JSON lines.
    """

    url: str
    model: str
    cache: Path

    def verdicts(self, records: Sequence[Record]) -> dict[str, bool | None]:
        """Record id → right, wrong, or None if the judge's reply is neither yes nor no.

        Only records with the state "scored" are judged. Raises VlmgraftError if the endpoint cannot be reached; earlier
        verdicts are kept.
        """
        known = {row["key"]: row["right"] for row in read_rows(self.cache)} if self.cache.is_file() else {}
        verdicts: dict[str, bool | None] = {}
        for record in records:
            if record.state != "scored":
                continue
            prompt = PROMPT.format(
                question=record.prompt, reference=" or ".join(record.expected), answer=record.output[-LONGEST_ANSWER:]
            )
            key = hashlib.sha256(f"{self.model}\0{prompt}".encode()).hexdigest()
            if key not in known:
                known[key] = self._ask(prompt)
                append_row(self.cache, {"key": key, "right": known[key]})
            verdicts[record.id] = known[key]
        return verdicts

    def _ask(self, prompt: str) -> bool | None:
        endpoint = Endpoint(self.url, self.model, key="OPENAI_API_KEY")
        reply = endpoint.chat(prompt, {"temperature": 0, "max_tokens": 8})["choices"][0]["message"].get("content")
        if not isinstance(reply, str) or not reply.strip():
            raise VlmgraftError(f"judge {self.model} at {self.url}: replied no text; does it think before it answers?")
        word = re.match(r"\W*(yes|no)\b", reply, re.IGNORECASE)
        return None if word is None else word[1].lower() == "yes"


def agreement(records: Sequence[Record], verdicts: Mapping[str, bool | None]) -> dict[str, float]:
    """The judge's score, and the share of its verdicts that the rules agree with (a score of ½ or more is right)."""
    pairs = [
        (right, (record.score or 0) >= 0.5) for record in records if (right := verdicts.get(record.id)) is not None
    ]
    if not pairs:
        return {}
    total = len(pairs)
    return {
        "judge's score": sum(right for right, _ in pairs) / total,
        "agreement with the judge": sum(right == ruled for right, ruled in pairs) / total,
    }
