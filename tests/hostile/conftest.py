"""Folders, recipes and data files made to deceive, and the command line that must refuse them."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
