"""What a merge costs on paper: bytes, operations and memory by stage, model size, rank and number of GPUs."""

from vlmgraft.scale.cost import Stage, Work, stages
from vlmgraft.scale.models import MODELS, Model

__all__ = ["MODELS", "Model", "Stage", "Work", "stages"]
