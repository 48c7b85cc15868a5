"""Analyses of models and merges: distances, spectra, knock-outs, rank bands, sweeps, choice, attention, divergence.

Functions are loaded when first used: importing the package loads neither torch nor transformers.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vlmgraft.analysis.choice import choose as choose
    from vlmgraft.analysis.direction import steer as steer
    from vlmgraft.analysis.divergence import kl_divergence as kl_divergence
    from vlmgraft.analysis.eval_data import EvalData as EvalData
    from vlmgraft.analysis.inspection import Inspection as Inspection, inspect_weights as inspect_weights
    from vlmgraft.analysis.layer_knockout import knockout as knockout
    from vlmgraft.analysis.prediction import predict_perception as predict_perception
    from vlmgraft.analysis.rank_bands import ranks as ranks
    from vlmgraft.analysis.recipe_sweep import sweep as sweep
    from vlmgraft.analysis.spectra import measure_spectra as measure_spectra
    from vlmgraft.analysis.visual_attention import attention as attention

_HOME = {
    "EvalData": "eval_data",
    "Inspection": "inspection",
    "attention": "visual_attention",
    "choose": "choice",
    "inspect_weights": "inspection",
    "kl_divergence": "divergence",
    "knockout": "layer_knockout",
    "measure_spectra": "spectra",
    "predict_perception": "prediction",
    "ranks": "rank_bands",
    "steer": "direction",
    "sweep": "recipe_sweep",
}  # no module has the name of a function: importing it would replace the function
__all__ = list(_HOME)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
