"""What answers at once loads nothing heavy."""

from __future__ import annotations

import subprocess
import sys

import pytest

HEAVY = ("torch", "transformers", "matplotlib", "sklearn", "huggingface_hub")
REPORT = f"import sys; print([name for name in {HEAVY} if name in sys.modules])"
HELP = """
import sys
sys.argv = ["vlmgraft", *{arguments!r}]
from vlmgraft import cli
try:
    cli.main()
except SystemExit as stop:
    assert not stop.code, stop.code
"""


@pytest.mark.parametrize(
    "code",
    [
        "import vlmgraft",
        "import vlmgraft.alignment, vlmgraft.checkpoint.index, vlmgraft.recipe.model, vlmgraft.pipeline",
        HELP.format(arguments=["--help"]),
        HELP.format(arguments=["merge", "--help"]),
        HELP.format(arguments=["merge", "--schema"]),
        HELP.format(arguments=["lab", "path"]),
        HELP.format(arguments=["--version"]),
    ],
    ids=["package", "header-only modules", "help", "merge help", "schema", "lab path", "version"],
)
def test_loads_nothing_heavy(code: str) -> None:
    ran = subprocess.run([sys.executable, "-c", f"{code}\n{REPORT}"], capture_output=True, text=True, timeout=60)
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.splitlines()[-1] == "[]"


def test_the_check_above_would_notice() -> None:
    ran = subprocess.run([sys.executable, "-c", f"import torch\n{REPORT}"], capture_output=True, text=True, timeout=120)
    assert ran.stdout.splitlines()[-1].startswith("['torch'")
