"""What needs no model loads none."""

from __future__ import annotations

import subprocess
import sys

import pytest

HEAVY = ("torch", "transformers", "datasets", "math_verify", "sympy", "vllm", "lmms_eval")


@pytest.mark.parametrize(
    "code",
    [
        "from vlmgraft.evaluation import answers, metrics; answers.judge('17', '17')",
        "import vlmgraft.evaluation.evaluate, vlmgraft.evaluation.lmms",
        "import vlmgraft; vlmgraft.compare",
    ],
)
def test_reading_answers_and_comparing_runs_load_nothing_heavy(code: str) -> None:
    report = f"import sys; print([name for name in {HEAVY} if name in sys.modules])"
    ran = subprocess.run([sys.executable, "-c", f"{code}\n{report}"], capture_output=True, text=True, timeout=120)
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.strip() == "[]"
