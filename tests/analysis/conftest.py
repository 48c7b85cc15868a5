"""The embedded VLM, its alignment and its factors."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))

from analysis_tools import LogitExam

from vlmgraft.alignment import Alignment, align
from vlmgraft.checkpoint.index import open_checkpoint
from vlmgraft.hf.models import load_processor, load_vlm
from vlmgraft.spectral.factors import Factors, factorize
from vlmgraft.spectral.task_vector import TaskVectors


@pytest.fixture(scope="session")
def alignment(trio: Path) -> Alignment:
    return align(*(open_checkpoint(trio / name) for name in ("vlm", "donor", "base")))


@pytest.fixture(scope="session")
def vlm_model(trio: Path) -> Any:
    return load_vlm(trio / "vlm", torch.float32)


@pytest.fixture(scope="session")
def processor(trio: Path) -> Any:
    return load_processor(trio / "vlm")


@pytest.fixture(scope="session")
def factors(alignment: Alignment) -> dict[str, Factors]:
    with TaskVectors(alignment) as taus:
        return {name: factorize(taus.load(name), name, taus.role(name)) for name in taus.names}


@pytest.fixture
def exam() -> LogitExam:
    return LogitExam()
