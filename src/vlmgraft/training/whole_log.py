"""A trainer's log that is the same whether a training was interrupted or not.

transformers 5.23 forgets the losses since the last row when it saves a checkpoint, and its mean loss at the end is that
of the steps since it was resumed; TRL 1.16 counts tokens anew. So a row is logged at every checkpoint and at the last
step, the mean is taken over the rows, and the count goes on from the last one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from transformers import TrainerCallback


class LogWhenSaving(TrainerCallback):  # type: ignore[misc, unused-ignore]
    """Logs at every step that is saved, and at the last one, and lets the trainer count on."""

    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """With the log of the checkpoint that is resumed, if any."""
        counts = [row["num_tokens"] for row in state.log_history if "num_tokens" in row]
        if counts and hasattr(self.trainer, "_total_train_tokens"):
            self.trainer._total_train_tokens = int(counts[-1])

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
    return tuple(dict(sorted(row.items())) for row in (*log[:-1], {**log[-1], "train_loss": mean}))
