"""Gated projections: y = W x + b + U (c ⊙ (Vh x)) with frozen W and factors, and a learned spectrum c = λ σ(g) ⊙ s.

Two backends compute the same thing:
- "factored": three thin products; the backward pass keeps only x Vhᵀ [tokens, r] besides the frozen factors.
- "rebuilt": W + U diag(c) Vh is formed once per call and the gradient of c is read from the gradient of that weight;
  cheaper at full rank once there are more tokens than about 0.8 r per call (see `choose_backend`). In bfloat16 an
  update below W's resolution vanishes there, as it does in the folded checkpoint.

`gated(...)` swaps the projections of a model for gated ones and puts the originals back on exit, whatever happens.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from vlmgraft.errors import AlignmentError
from vlmgraft.spectral.factors import Factors

Backend = Literal["auto", "factored", "rebuilt"]

# the rebuild's operations count this much more than the others': at full rank and square that puts the break-even at
# 0.8 r tokens, as measured (1.6k, 2.8k, 4.0k tokens for r = 2048, 3584, 5120)
REBUILD_WEIGHT = 1.2


def gated_naive(
    x: Float[Tensor, "*batch in"],
    weight: Float[Tensor, "out in"],
    bias: Float[Tensor, " out"] | None,
    U: Float[Tensor, "out r"],
    spectrum: Float[Tensor, " r"],
    Vh: Float[Tensor, "r in"],
) -> Float[Tensor, "*batch out"]:
    """The gated projection by plain autograd: the twin that both backends are tested against."""
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


class GatedLinear(nn.Module):
    """A frozen linear layer plus gated factors.

    `spectrum` [r] is set from outside before every forward pass (it is λ σ(g) ⊙ s, part of the autograd graph); None
    means the original layer. U and Vh are in the layer's dtype and on its device.
    """

    def __init__(self, linear: nn.Linear, factors: Factors, backend: Backend = "auto") -> None:
        super().__init__()
        shape = tuple(linear.weight.shape)
        if shape != factors.shape:
            raise AlignmentError(f"{factors.name}: factors of shape {factors.shape} do not fit a weight of {shape}")
        self.linear = linear
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.backend: Backend = backend
        self.register_buffer("U", factors.U.to(linear.weight.device, linear.weight.dtype), persistent=False)
        self.register_buffer("Vh", factors.Vh.to(linear.weight.device, linear.weight.dtype), persistent=False)
        self.spectrum: Tensor | None = None

    @property
    def weight(self) -> Tensor:
        """The frozen weight: some models read it from the layer."""
        return self.linear.weight

    @property
    def bias(self) -> Tensor | None:
        """The frozen bias, if any."""
        return self.linear.bias

    def forward(self, x: Float[Tensor, "*batch in"]) -> Float[Tensor, "*batch out"]:
        """The gated projection of x."""
        if self.spectrum is None:
            return self.linear(x)
        tokens = x.numel() // x.shape[-1]
        shape = (self.out_features, self.in_features)
        route = choose_backend(tokens, shape, len(self.spectrum), self.backend)
        function = FactoredProjection if route == "factored" else RebuiltProjection
        return function.apply(x, self.linear.weight, self.linear.bias, self.U, self.spectrum, self.Vh)


class GatedLayers(dict[str, GatedLinear]):
    """The gated layers of a model by tensor name, with their spectra set together."""

    def set(self, spectra: Mapping[str, Tensor] | None) -> None:
        """Set every layer's spectrum; None turns all gates off: the model is then the original one."""
        for name, layer in self.items():
            layer.spectrum = None if spectra is None else spectra[name].to(layer.weight.device)


@contextmanager
def gated(
    model: nn.Module, linears: Mapping[str, nn.Linear], factors: Mapping[str, Factors], backend: Backend = "auto"
) -> Iterator[GatedLayers]:
    """Swap `linears` (tensor name → layer of `model`) for gated layers inside the context, gates off at first.

    Everything is put back on exit, also after an exception: the same layer objects, the same requires_grad flags.
    """
    parents = {id(child): (parent, key) for parent in model.modules() for key, child in parent.named_children()}
    missing = [name for name in linears if id(linears[name]) not in parents]
    if missing:
        raise AlignmentError(f"{missing[0]}: its layer is not part of the model")
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    layers = GatedLayers({name: GatedLinear(linear, factors[name], backend) for name, linear in linears.items()})
    try:
        for parameter, _ in flags:
            parameter.requires_grad_(False)
        for name, layer in layers.items():
            parent, key = parents[id(linears[name])]
            setattr(parent, key, layer)
        yield layers
    finally:
        for linear in linears.values():
            parent, key = parents[id(linear)]
            setattr(parent, key, linear)
        for parameter, flag in flags:
            parameter.requires_grad_(flag)
