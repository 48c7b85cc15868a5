"""The lab: a base LLM, a VLM and a donor, small enough for a laptop, that show the effect the papers are about."""

from pathlib import Path


def trio_path() -> Path:
    """Folder of the embedded trio: `base`, `vlm` and `donor`, ordinary transformers checkpoints in bf16."""
    return Path(__file__).parent / "weights"
