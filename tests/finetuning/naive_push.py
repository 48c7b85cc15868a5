"""DRIFT's push of one tensor, written out as in the paper: the slow twin of what the trainer does."""

from __future__ import annotations

from torch import Tensor, zeros

from vlmgraft.finetuning.prior import PushRule


def pushed(grad: Tensor, delta: Tensor, rule: PushRule, parameter: Tensor | None = None) -> Tensor:
    """g' of one tensor at the first step.

    grad, delta, parameter: one shape; the parameter is needed for `rescale` alone. A Δ of zero pushes nothing.
    """
    norm = delta.norm()
    if norm == 0:
        return grad.clone()
    if rule.mode == "absolute":
        length = parameter.norm() / norm if rule.rescale and parameter is not None else 1.0
        return grad - rule.strength * length * delta
    unit, size = delta / norm, grad.norm()
    if rule.mode == "grad_norm":
        return grad - rule.strength * size * unit
    cos = (grad * unit).sum() / size if size > 0 else zeros(())
    return grad - rule.strength * (1 + cos) / 2 * size * unit
