"""Merging: a plan from headers alone, then a stream of chunks into a new checkpoint, published with its receipt.

`plan_merge` loads no torch; the rest of this package does, so it is loaded on first use.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from vlmgraft.merging.plan import MergePlan, plan_merge

if TYPE_CHECKING:
    from vlmgraft.merging.merge import merge_tensors
    from vlmgraft.merging.receipt import Receipt, TensorReceipt

__all__ = ["MergePlan", "Receipt", "TensorReceipt", "merge_tensors", "plan_merge"]


def __getattr__(name: str) -> Any:
    if name in __all__:
        home = "merge" if name == "merge_tensors" else "receipt"
        return getattr(import_module(f"vlmgraft.merging.{home}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
