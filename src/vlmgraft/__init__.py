"""vlmgraft: give a vision-language model the reasoning of a text model of its family, without losing sight.

    import vlmgraft as vg
    vg.merge("recipe.yaml", "merged")

The main functions and what they give back; analyses are in `vg.analysis`. They are loaded when first used, so importing
the package loads neither torch nor transformers.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from vlmgraft._version import __version__ as __version__

if TYPE_CHECKING:
    from vlmgraft import analysis as analysis
    from vlmgraft.checkpoint.verify import verify
    from vlmgraft.costs.dry_run import dry_run
    from vlmgraft.distillation.front import front
    from vlmgraft.evaluation.evaluate import compare, evaluate
    from vlmgraft.evaluation.records import load_records
    from vlmgraft.evaluation.summary import Summary
    from vlmgraft.finetuning.callback import DriftCallback
    from vlmgraft.finetuning.delta import load_prior
    from vlmgraft.finetuning.tune import tune
    from vlmgraft.merging import Receipt
    from vlmgraft.pipeline import Plan, decompose, export_lora, gates, inspect, merge
    from vlmgraft.recipe.model import load_recipe
    from vlmgraft.report.page import write_report
    from vlmgraft.spectral.gates import Gates

__all__ = [
    "DriftCallback",
    "Gates",
    "Plan",
    "Receipt",
    "Summary",
    "compare",
    "decompose",
    "dry_run",
    "evaluate",
    "export_lora",
    "front",
    "gates",
    "inspect",
    "load_prior",
    "load_recipe",
    "load_records",
    "merge",
    "tune",
    "verify",
    "write_report",
]

_HOME = {
    "Gates": "vlmgraft.spectral.gates",
    "Plan": "vlmgraft.recipe.resolve",
    "Receipt": "vlmgraft.merging.merge",
    "Summary": "vlmgraft.evaluation.summary",
    "compare": "vlmgraft.evaluation.evaluate",
    "dry_run": "vlmgraft.costs.dry_run",
    "front": "vlmgraft.distillation.front",
    "evaluate": "vlmgraft.evaluation.evaluate",
    "load_recipe": "vlmgraft.recipe.model",
    "load_records": "vlmgraft.evaluation.records",
    "write_report": "vlmgraft.report.page",
    "DriftCallback": "vlmgraft.finetuning.callback",
    "load_prior": "vlmgraft.finetuning.delta",
    "tune": "vlmgraft.finetuning.tune",
    "verify": "vlmgraft.checkpoint.verify",
}


def __getattr__(name: str) -> Any:
    if name == "analysis":
        return importlib.import_module("vlmgraft.analysis")
    if name not in __all__:
        raise AttributeError(f"module 'vlmgraft' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME.get(name, "vlmgraft.pipeline")), name)
