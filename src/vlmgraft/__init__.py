"""vlmgraft: give a vision-language model the reasoning of a text model of its family, without losing sight.

    import vlmgraft as vg
    vg.merge("recipe.yaml", "merged")

The main functions and their result types; analyses are in `vg.analysis`. They are loaded when first used, so importing
the package loads neither torch nor transformers.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from vlmgraft._version import __version__ as __version__

if TYPE_CHECKING:
    from vlmgraft import analysis as analysis
    from vlmgraft.checkpoint.verify import verify as verify
    from vlmgraft.costs.dry_run import dry_run as dry_run
    from vlmgraft.distillation.front import front as front
    from vlmgraft.evaluation.evaluate import compare as compare, evaluate as evaluate
    from vlmgraft.evaluation.records import load_records as load_records
    from vlmgraft.evaluation.summary import Summary as Summary
    from vlmgraft.finetuning.callback import DriftCallback as DriftCallback
    from vlmgraft.finetuning.delta import load_prior as load_prior
    from vlmgraft.finetuning.tune import tune as tune
    from vlmgraft.merging import Receipt as Receipt
    from vlmgraft.pipeline import (
        Plan as Plan,
        decompose as decompose,
        export_lora as export_lora,
        gates as gates,
        inspect as inspect,
        merge as merge,
    )
    from vlmgraft.recipe.model import load_recipe as load_recipe
    from vlmgraft.report.page import write_report as write_report
    from vlmgraft.spectral.gates import Gates as Gates

_BY_MODULE = {
    "checkpoint.verify": ("verify",),
    "costs.dry_run": ("dry_run",),
    "distillation.front": ("front",),
    "evaluation.evaluate": ("compare", "evaluate"),
    "evaluation.records": ("load_records",),
    "evaluation.summary": ("Summary",),
    "finetuning.callback": ("DriftCallback",),
    "finetuning.delta": ("load_prior",),
    "finetuning.tune": ("tune",),
    "merging.receipt": ("Receipt",),
    "pipeline": ("decompose", "export_lora", "gates", "inspect", "merge"),
    "recipe.model": ("load_recipe",),
    "recipe.resolve": ("Plan",),
    "report.page": ("write_report",),
    "spectral.gates": ("Gates",),
}
_HOME = {name: f"vlmgraft.{module}" for module, names in _BY_MODULE.items() for name in names}
__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    if name == "analysis":
        return importlib.import_module("vlmgraft.analysis")
    if name not in _HOME:
        raise AttributeError(f"module 'vlmgraft' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME[name]), name)
