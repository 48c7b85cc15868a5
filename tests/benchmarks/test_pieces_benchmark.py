"""The single figures are counted and compared as the page says."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "pieces.py"


def test_quick_writes_every_figure(tmp_path: Path) -> None:
    command = [sys.executable, str(SCRIPT), "--quick", "--out", str(tmp_path / "pieces.json")]
    subprocess.run(command, check=True, capture_output=True, timeout=240)
    found = json.loads((tmp_path / "pieces.json").read_text())
    assert found["padding"]["sorted, by tokens"] < 1.2 < 2 < found["padding"]["in any order"]
    assert found["padding"]["asked by their tokens"] < 1.1 < 1.8 < found["padding"]["asked by their text"]
    assert found["padding"]["largest batch, tokens, asked by their tokens"] <= 65536
    # 1600 / 28 = 57.1 and 1200 / 28 = 42.9; 2448 / 28 = 87.4 and 3264 / 28 = 116.6
    assert [photograph["tokens"] for photograph in found["pictures"].values()] == [57 * 43, 87 * 117]
    assert found["bound"]["from below"] < found["bound"]["whole"] < found["bound"]["from above"]
    assert found["outside"]["check inside passes"] and not found["outside"]["check outside passes"]
    assert found["finite"]["isfinite ÷ norm"] > 0
