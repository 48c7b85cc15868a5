"""The command line: parses arguments, calls the public function of the same name, shows its result.

Each command has a file, in which a dataclass defines its options (see `options.py`). Importing the file registers the
command; the imports are in the order of `--help`. No heavy library is imported before a command runs.
"""

# isort: off
from vlmgraft.cli import demo, init, inspect, merge, decompose, gates, front, tune
from vlmgraft.cli import evaluate, compare, drift, knockout, ranks, sweep, choose, attention, steer
from vlmgraft.cli import report, play, export, verify, costs, lab

# isort: on
from vlmgraft.cli.app import main
from vlmgraft.cli.options import app

__all__ = [
    "app", "attention", "choose", "compare", "costs", "decompose", "demo", "drift", "evaluate", "export", "front",
    "gates", "init", "inspect", "knockout", "lab", "main", "merge", "play", "ranks", "report", "steer", "sweep", "tune",
    "verify",
]  # fmt: skip
