"""Checkpoint folders: what they hold, reading them, writing them."""

from vlmgraft.checkpoint.index import Checkpoint, TensorInfo, open_checkpoint

__all__ = ["Checkpoint", "TensorInfo", "open_checkpoint"]
