"""A trainer's log that is the same whether a training was interrupted or not.

transformers 5.23 forgets the losses since the last row when it saves a checkpoint, and its mean loss at the end is that
of the steps since it was resumed. So a row is logged at every checkpoint and at the last step, and the mean is taken
over the rows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from transformers import TrainerCallback


class LogWhenSaving(TrainerCallback):  # type: ignore[misc, unused-ignore]
    """Logs at every step that is saved, and at the last one."""

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> Any:
        """After the trainer's own callback has said what is due at this step."""
        if control.should_save or state.global_step >= state.max_steps:
            control.should_log = True
        return control


def whole_log(log: Sequence[Mapping[str, Any]]) -> tuple[dict[str, Any], ...]:
    """The rows, the last of them with the mean loss of all steps (NaN where none was logged)."""
    total, before = 0.0, 0
    for row in log:
        if "loss" in row:
            total, before = total + float(row["loss"]) * (row["step"] - before), int(row["step"])
    mean = total / before if before else float("nan")
    return (*map(dict, log[:-1]), {**log[-1], "train_loss": mean})
