"""Gradient of a question's loss along every singular direction: the scores whose squares are the Fisher diagonal.

    score_i = Σ_t (δ_t · u_i)(x_t · v_i) · s_i

of a question's answer tokens t (see `curvature.py`). Of linear layers it is read from their inputs and the gradients at
their outputs, one backward pass per batch. Where experts are fused, the model decides which tokens pass a
matrix: there it is the gradient of the question's loss for a spectrum at zero, the same number, at one backward pass
per question.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from vlmgraft.distillation.gated_layers import frozen
from vlmgraft.distillation.targets import TargetBatch
from vlmgraft.spectral.factors import Factors

if TYPE_CHECKING:
    from vlmgraft.distillation.distill import Distiller

Scored = Callable[[TargetBatch, torch.Generator], Iterator[tuple[str, Tensor]]]
"""Per tensor, scores [questions, r] of one batch; a tensor may come in several parts."""


@contextmanager
def tapped_scores(distiller: Distiller) -> Iterator[Scored]:
    """Scores of linear layers, from their inputs and the gradients at their outputs: one backward pass per batch."""

    def scored(batch: TargetBatch, generator: torch.Generator) -> Iterator[tuple[str, Tensor]]:
        with _taps(distiller) as taps:
            _losses(distiller.model, batch, generator).sum().backward()
        for name, (x, delta) in taps.items():
            yield name, question_scores(x, delta, distiller.factors[name])

    yield scored


@contextmanager
def question_gradients(distiller: Distiller) -> Iterator[Scored]:
    """The same scores by automatic differentiation, of any projection: one backward pass per question."""
    spectra = {
        name: torch.zeros(factors.s.shape, device=distiller.model.device, requires_grad=True)
        for name, factors in distiller.factors.items()
    }
    s = {name: factors.s.float().to(distiller.model.device) for name, factors in distiller.factors.items()}
    with distiller.gated() as layers:
        layers.set(spectra)

        def scored(batch: TargetBatch, generator: torch.Generator) -> Iterator[tuple[str, Tensor]]:
            losses = _losses(distiller.model, batch, generator)
            rows = batch.predicts.nonzero()[:, 0].to(losses.device)
            for row in range(len(batch.predicts)):
                loss = losses[rows == row].sum()
                for name, slope in zip(
                    spectra, torch.autograd.grad(loss, [*spectra.values()], retain_graph=True), strict=True
                ):
                    yield name, (slope * s[name])[None]

        yield scored


def _losses(model: Any, batch: TargetBatch, generator: torch.Generator) -> Float[Tensor, " N"]:
    """−log p of a token drawn from the model at every answer position."""
    log_p = batch.logits(model).float().log_softmax(-1)
    return -log_p.gather(-1, draw_tokens(log_p.detach(), generator)[:, None])[:, 0]


def question_scores(
    x: Float[Tensor, "batch length in"], delta: Float[Tensor, "batch length out"], factors: Factors
) -> Float[Tensor, "batch r"]:
    """Σ_t (δ_t · u_i)(x_t · v_i) s_i per question."""
    inner = x.float() @ factors.Vh.to(x.device).float().mT
    outer = delta.float() @ factors.U.to(x.device).float()
    return (inner * outer).sum(1) * factors.s.to(x.device).float()


def draw_tokens(log_p: Float[Tensor, "N vocabulary"], generator: torch.Generator) -> Int[Tensor, " N"]:
    """One token per position from the teacher's distribution."""
    return torch.multinomial(log_p.exp().cpu(), 1, generator=generator)[:, 0].to(log_p.device)


@contextmanager
def _taps(distiller: Distiller) -> Iterator[dict[str, tuple[Tensor, Tensor]]]:
    """Record every gated layer's input and the gradient at its output; hooks and flags are undone on exit."""
    taps: dict[str, tuple[Tensor, Tensor]] = {}

    def tap(name: str, module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        x = args[0].detach()
        if not output.requires_grad:
            output.requires_grad_()  # nothing below needs a gradient: the graph starts here

        def keep(gradient: Tensor) -> None:
            taps[name] = (x, gradient.detach())

        output.register_hook(keep)

    with frozen(distiller.model), ExitStack() as hooks:
        for name, linear in distiller.linears.items():
            hooks.callback(linear.register_forward_hook(partial(tap, name)).remove)
        yield taps
