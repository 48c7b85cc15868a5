"""The command line: reads arguments, calls the public function of the same name, shows what it gave.

Nothing heavy is imported before a command runs. Exit codes: 0 done, 1 the work failed, 2 recipe or inputs are wrong
(nothing was started), 130 interrupted.

One file per group of commands; importing it registers them, here in the order of `--help`.
"""

from vlmgraft.cli import analysis, attention, evaluate, front, lab, merge, report, tune, verify
from vlmgraft.cli.app import app, main

__all__ = ["analysis", "app", "attention", "evaluate", "front", "lab", "main", "merge", "report", "tune", "verify"]
