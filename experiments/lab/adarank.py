"""AdaRank (arXiv 2503.22178): which singular directions to keep, by the entropy of the merged model's predictions.

    W = W_vlm + w·U diag(B ⊙ s) Vh,   B_i = 1[σ(m_i/T) > ½]          loss = mean entropy of the next-token distributions

m (one per direction) and w (one per matrix) are trained by Adam on unlabelled questions; the gradient passes through B
as through σ(m_i/T) (straight through). As in the released code: m starts at 0.1, every direction open, w at 0.3, T 10.
Written for classifiers of images and of sentences; here a prediction is a distribution at a token of the VLM's own
answer, and the model that is merged into is the VLM, so that there is one task vector. Steps and learning rate are our
choices (released: 10,000 and 1e-3, or 5,000 and 5e-5). Nothing in the loss keeps the model near the VLM or draws it
to the donor: an entropy is also low where every answer is the same.
"""

from __future__ import annotations

import math
from itertools import islice
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor

from vlmgraft.distillation.gated_layers import gated
from vlmgraft.errors import NumericalError, RecipeError
from vlmgraft.spectral.gates import Gates

if TYPE_CHECKING:
    from vlmgraft.distillation.distill import Distiller

START, WEIGHT, TEMPERATURE = 0.1, 0.3, 10.0


def adarank_gates(distiller: Distiller, *, steps: int = 200, learning_rate: float = 1e-3, seed: int = 0) -> Gates:
    """Masks and weights from a distiller's calibration questions, as gates: σ(g) is B·w/λ, λ the largest w.

    Before the first step every direction is open and λ is 0.3. The model is left as it was.

    Raises:
        RecipeError: the distiller is sharded, or a setting is not positive. NumericalError: the loss is not finite.
    """
    if distiller.sharded or steps < 0 or not learning_rate > 0:
        raise RecipeError(f"adarank: needs whole weights, steps ({steps}) of 0 or more and a learning_rate above 0")
    device = distiller.model.device
    s = {name: factors.s.float().to(device) for name, factors in distiller.factors.items()}
    masks = {name: torch.full_like(values, START).requires_grad_() for name, values in s.items()}
    weights = {name: torch.tensor(WEIGHT, device=device, requires_grad=True) for name in s}
    optimizer = torch.optim.Adam([*masks.values(), *weights.values()], lr=learning_rate)
    log = []
    with gated(distiller.model, distiller.linears, distiller.factors, distiller.backend) as layers:
        for step, batch in enumerate(islice(distiller.targets.order(seed), steps)):
            layers.set({name: weights[name] * straight_through(masks[name]) * s[name] for name in s})
            loss = entropy(batch.logits(distiller.model)).mean()
            if not math.isfinite(float(loss.detach())):
                raise NumericalError(f"the loss is {float(loss)}: lower learning_rate ({learning_rate})")
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            log.append({"step": step, "loss": round(float(loss.detach()), 7)})
            if distiller.progress is not None:
                distiller.progress(step + 1, steps, "adarank")
    scale = max(max(float(weight.detach()) for weight in weights.values()), 1e-6)
    logits = {}
    for name, mask in masks.items():
        opened = (mask.detach() > 0) * (weights[name].detach() / scale).clamp(0, 1)
        logits[name] = opened.logit().float().cpu()
    settings = {"inject": "adarank", "steps": steps, "learning_rate": learning_rate, "seed": seed}
    return Gates(logits, scale, settings, tuple(log), distiller.digest)


def straight_through(mask: Float[Tensor, " r"]) -> Float[Tensor, " r"]:
    """1 where σ(m/T) > ½, else 0, with the gradient of σ(m/T)."""
    soft = (mask / TEMPERATURE).sigmoid()
    return soft + ((soft > 0.5).to(soft) - soft).detach()


def entropy(logits: Float[Tensor, "N vocabulary"]) -> Float[Tensor, " N"]:
    """−Σ p log p per token, in nats."""
    log_p = logits.float().log_softmax(-1)
    return -(log_p.exp() * log_p).sum(-1)
