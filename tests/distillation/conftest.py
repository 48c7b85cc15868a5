"""A second donor for the rooms of gates."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file


@pytest.fixture(scope="module")
def second(trio: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Another donor of the same base."""
    folder = tmp_path_factory.mktemp("second") / "donor"
    shutil.copytree(trio / "donor", folder)
    tensors, generator = load_file(folder / "model.safetensors"), torch.Generator().manual_seed(0)
    for name, tensor in tensors.items():
        if ".layers." in name and tensor.ndim == 2:
            tensor += 0.02 * torch.randn(tensor.shape, generator=generator).to(tensor.dtype)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder
