"""Every image-text-to-text class of transformers is merged as its modules are, or refused, as the page says."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import sweep
import tiny
import transformers

EVERY = sorted(tiny.VISION)
ABOUT, *KNOWN = json.loads(sweep.RESULTS.read_text(encoding="utf-8"))
FEW = EVERY[::9]
REFUSED = {
    "blip": "an encoder of text with cross-attention, made like BERT",
    "florence2": "an encoder and a decoder",
    "git": "an encoder of text, made like BERT",
    "inkling_mm_model": "transformers gives the VLM's tensors other names than the text model's",
    "kimi_k25": "transformers writes text models of other kinds than its own under the tower's names",
    "mistral4": "a text model that transformers lists among those that see",
    "pix2struct": "an encoder and a decoder",
    "pp_formulanet": "an encoder and a decoder",
    "t5gemma2": "an encoder and a decoder",
    "udop": "an encoder and a decoder",
    "vision-encoder-decoder": "an encoder and a decoder",
}
"""Why some are refused; every other class must be merged."""


@pytest.mark.parametrize(
    "model_type", [pytest.param(kind, marks=() if kind in FEW else pytest.mark.slow) for kind in EVERY]
)
def test_a_class_is_merged_as_its_modules_are_or_refused(model_type: str, tmp_path: Path) -> None:
    guest = sweep.GUESTS[EVERY.index(model_type) % len(sweep.GUESTS)]
    rows = list(sweep.rows([model_type], tmp_path, [guest]))
    if impossible := [row.impossible for row in rows if row.impossible]:
        pytest.skip(impossible[0])
    for row in rows:
        assert row.state in ("right", "refused"), row
        assert not row.reason or "AlignmentError" in row.reason, row.reason
    if ABOUT["transformers"] == transformers.__version__:
        for row in rows:
            found = {key: value for key, value in sweep.known(row).items() if key != "why"}
            assert any(found.items() <= known.items() for known in KNOWN), f"{found}: run sweep.py, its page is old"
    refused = [row.vlm for row in rows if row.state == "refused"]
    assert not refused or model_type in REFUSED, rows


def test_the_results_hold_nothing_wrong() -> None:
    states = [row["state"] for row in KNOWN]
    assert states.count("right") >= 346 and set(states) <= {"right", "refused", "not made"}
    assert all(row.get("why") for row in KNOWN if row["state"] != "right")
    assert {row["vlm"] for row in KNOWN} == set(tiny.VISION.values()) or ABOUT[
        "transformers"
    ] != transformers.__version__
