"""A VLM, a base and a donor on disk, and their alignment."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from experiments.lab.models import build_text_model, build_vlm, save

sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """vlm, base, and a donor near the base, as transformers saves them."""
    root = tmp_path_factory.mktemp("trio")
    save(build_vlm(0), root / "vlm")
    base = build_text_model(0)
    save(base, root / "base")
    with torch.no_grad():
        for parameter in base.parameters():
            parameter += 0.01 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1))
    save(base, root / "donor")
    return root
