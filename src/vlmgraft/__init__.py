"""vlmgraft: give a vision-language model the reasoning of a text model of its family, without losing sight.

    import vlmgraft as vg
    vg.merge("recipe.yaml", "merged")

Every command of the command line is one of these functions. They are loaded when first used, so importing the package
loads neither torch nor transformers.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vlmgraft.checkpoint.verify import verify
    from vlmgraft.evaluation.run_records import load_records
    from vlmgraft.lab.demo import demo
    from vlmgraft.measure import compare, evaluate
    from vlmgraft.pipeline import decompose, export, gates, inspect, merge
    from vlmgraft.recipe import load_recipe
    from vlmgraft.report.page import write_report
    from vlmgraft.studies import Asked, attention, drift, front, inspect_weights, knockout, ranks, sweep
    from vlmgraft.training.drift_callback import DriftCallback
    from vlmgraft.training.prior_delta import load_prior
    from vlmgraft.tuning import tune

__version__ = "0.1.0"
__all__ = [
    "Asked",
    "DriftCallback",
    "attention",
    "compare",
    "decompose",
    "demo",
    "drift",
    "evaluate",
    "export",
    "front",
    "gates",
    "inspect",
    "inspect_weights",
    "knockout",
    "load_prior",
    "load_recipe",
    "load_records",
    "merge",
    "ranks",
    "sweep",
    "tune",
    "verify",
    "write_report",
]

_HOME = {
    "compare": "vlmgraft.measure",
    "evaluate": "vlmgraft.measure",
    "demo": "vlmgraft.lab.demo",
    "load_recipe": "vlmgraft.recipe",
    "load_records": "vlmgraft.evaluation.run_records",
    "Asked": "vlmgraft.studies",
    "attention": "vlmgraft.studies",
    "drift": "vlmgraft.studies",
    "front": "vlmgraft.studies",
    "inspect_weights": "vlmgraft.studies",
    "knockout": "vlmgraft.studies",
    "ranks": "vlmgraft.studies",
    "sweep": "vlmgraft.studies",
    "write_report": "vlmgraft.report.page",
    "DriftCallback": "vlmgraft.training.drift_callback",
    "load_prior": "vlmgraft.training.prior_delta",
    "tune": "vlmgraft.tuning",
    "verify": "vlmgraft.checkpoint.verify",
}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'vlmgraft' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME.get(name, "vlmgraft.pipeline")), name)
