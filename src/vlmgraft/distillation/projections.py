"""The arithmetic of gated projections: y = W x + b + U (c ⊙ (Vh x)).

W and the factors are frozen, the spectrum c = λ σ(g) ⊙ s is learned.

Two backends compute the same thing:
- "factored": three thin products; the backward pass keeps only x Vhᵀ [tokens, r] besides the frozen factors.
- "rebuilt": W + U diag(c) Vh is formed once per call and the gradient of c is read from the gradient of that weight;
  cheaper at full rank once there are more tokens than about 0.8 r per call (see `choose_backend`). In bfloat16 an
  update below W's resolution vanishes there, as it does in the folded checkpoint.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable

Backend = Literal["auto", "factored", "rebuilt"]

REBUILD_WEIGHT = 1.2
"""Cost of an operation of the rebuild relative to one of the products. At full rank, for square matrices, it puts the
break-even at 0.8 r tokens, as measured (1.6k, 2.8k, 4.0k tokens for r = 2048, 3584, 5120)."""


def gated_naive(
    x: Float[Tensor, "*batch in"],
    weight: Float[Tensor, "out in"],
    bias: Float[Tensor, " out"] | None,
    U: Float[Tensor, "out r"],
    spectrum: Float[Tensor, " r"],
    Vh: Float[Tensor, "r in"],
) -> Float[Tensor, "*batch out"]:
    """The gated projection by plain autograd: the reference that both backends are tested against."""
    return F.linear(x, weight, bias) + ((x @ Vh.mT) * spectrum.to(x.dtype)) @ U.mT


class FactoredProjection(torch.autograd.Function):
    """The factored backend; arguments as in `gated_naive`, gradients for x and spectrum only."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, U: Tensor, spectrum: Tensor, Vh: Tensor
    ) -> Tensor:
        inner = F.linear(x, Vh)
        ctx.save_for_backward(inner, weight, U, spectrum, Vh)
        # the product stays in x's dtype: promoting it to float32 costs 40 % of a bfloat16 step
        y = F.linear(x, weight, bias)
        y.view(-1, y.shape[-1]).addmm_((inner * spectrum.to(x.dtype)).view(-1, len(spectrum)), U.mT)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, None, None, None, Tensor | None, None]:
        inner, weight, U, spectrum, Vh = ctx.saved_tensors
        outer = grad @ U
        grad_x = grad_spectrum = None
        if ctx.needs_input_grad[4]:
            grad_spectrum = (outer * inner).flatten(0, -2).sum(0, dtype=spectrum.dtype)
        if ctx.needs_input_grad[0]:
            grad_x = grad @ weight
            grad_x.view(-1, grad_x.shape[-1]).addmm_((outer * spectrum.to(grad.dtype)).view(-1, len(spectrum)), Vh)
        return grad_x, None, None, None, grad_spectrum, None


class RebuiltProjection(torch.autograd.Function):
    """The merged-weight backend; arguments as in `gated_naive`, gradients for x and spectrum only."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, U: Tensor, spectrum: Tensor, Vh: Tensor
    ) -> Tensor:
        merged = torch.addmm(weight, (U * spectrum.to(U.dtype)).to(weight.dtype), Vh.to(weight.dtype))
        ctx.save_for_backward(x, merged, U, Vh)
        ctx.spectrum_dtype = spectrum.dtype
        return F.linear(x, merged, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, None, None, None, Tensor | None, None]:
        x, merged, U, Vh = ctx.saved_tensors
        grad_x = grad @ merged if ctx.needs_input_grad[0] else None
        grad_spectrum = None
        if ctx.needs_input_grad[4]:
            grad_weight = grad.flatten(0, -2).mT @ x.flatten(0, -2)
            grad_spectrum = ((U.mT @ grad_weight) * Vh).sum(1, dtype=ctx.spectrum_dtype)
        return grad_x, None, None, None, grad_spectrum, None


class RebuiltStack(torch.autograd.Function):
    """Fused experts W + U diag(c) Vh, [experts, out, in], as one weight; gradient for the spectrum [experts, r]."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, U: Tensor, spectrum: Tensor, Vh: Tensor) -> Tensor:
        ctx.save_for_backward(U, Vh)
        ctx.spectrum_dtype = spectrum.dtype
        return torch.baddbmm(weight, U * spectrum[:, None, :].to(U.dtype), Vh)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[None, None, Tensor, None]:
        U, Vh = ctx.saved_tensors
        return None, None, ((U.mT @ grad) * Vh).sum(-1, dtype=ctx.spectrum_dtype), None


def choose_backend(
    tokens: int, shape: tuple[int, int], rank: int, backend: Backend = "auto"
) -> Literal["factored", "rebuilt"]:
    """The cheaper backend for one call on `tokens` tokens through a layer of `shape` [out, in], by operations forward
    and backward: 4T(mn + r(m + n)) factored, 6Tmn + 4mnr rebuilt. At small ranks the factored one always wins."""
    if backend != "auto":
        return backend
    out, inner = shape
    saved = tokens * (4 * rank * (out + inner) - 2 * out * inner)
    return "rebuilt" if saved > REBUILD_WEIGHT * 4 * out * inner * rank else "factored"
