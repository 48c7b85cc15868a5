"""Small models in memory and passes over them, as a merge gives them to `prepare`."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
