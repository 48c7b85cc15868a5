"""Gated layers that temporarily replace a model's projections, linear layers or fused experts.

`gated(...)` swaps the projections of a model for gated ones and restores the originals on exit, also after an error.
`checkpointed(...)` trades time for memory in the same way. The arithmetic is in `projections.py`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import pad
from torch.utils.checkpoint import checkpoint

from vlmgraft.distillation.projections import (
    Backend,
    FactoredProjection,
    RebuiltProjection,
    RebuiltStack,
    choose_backend,
)
from vlmgraft.errors import AlignmentError
from vlmgraft.hf.modules import ExpertSlice, Projection, parameter_of, runs_on, text_model
from vlmgraft.spectral.factors import Factors


class GatedLinear(nn.Module):
    """A frozen linear layer plus gated factors.

    `spectrum` [r] is set from outside before every forward pass (it is λ σ(g) ⊙ s, part of the autograd graph); None
    means the original layer. U and Vh are in the layer's dtype and on its device; they are frozen parameters, so that
    sharding the layer shards them too.
    """

    def __init__(self, linear: nn.Linear, factors: Factors, backend: Backend = "auto") -> None:
        super().__init__()
        shape = tuple(linear.weight.shape)
        if shape != factors.shape:
            raise AlignmentError(f"{factors.name}: factors of shape {factors.shape} do not fit a weight of {shape}")
        self.linear = linear
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.backend: Backend = backend
        self.U, self.Vh = _frozen(factors.U, linear.weight), _frozen(factors.Vh, linear.weight)
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


class GatedStack(nn.Module):
    """Factors of one parameter of fused experts, [experts, out, in], with a spectrum [experts, r] or None."""

    def __init__(self, weight: nn.Parameter, factors: Factors, transposed: bool) -> None:
        super().__init__()
        U, Vh = (factors.Vh.mT, factors.U.mT) if transposed else (factors.U, factors.Vh)
        if (*U.shape[:-1], Vh.shape[-1]) != tuple(weight.shape):
            raise AlignmentError(
                f"{factors.name}: factors of shape {factors.shape} do not fit experts of {tuple(weight.shape)}"
            )
        self.device = weight.device
        self.U, self.Vh = _frozen(U, weight), _frozen(Vh, weight)
        self.spectrum: Tensor | None = None

    def merged(self, weight: Tensor) -> Tensor:
        """The experts' weight with the gated update."""
        return weight if self.spectrum is None else RebuiltStack.apply(weight, self.U, self.spectrum, self.Vh)


class GatedExperts(nn.Module):
    """A module of fused experts whose weights are rebuilt with their gated update in every call.

    The routing is unchanged: the model's own module runs with the rebuilt weights. If the checkpoint stores the experts
    transposed, so are its factors; they are transposed back here.
    """

    def __init__(self, experts: nn.Module, factors: Mapping[str, Factors]) -> None:
        super().__init__()
        self.experts = experts
        weights = {key: getattr(experts, key) for key in factors}
        transposed = any(tuple(weights[key].shape) != factors[key].shape for key in factors)
        self.gated = {key: GatedStack(weights[key], factors[key], transposed) for key in factors}
        self.stacks = nn.ModuleDict(self.gated)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The experts' own forward pass on gated weights."""
        merged = {key: stack.merged(getattr(self.experts, key)) for key, stack in self.gated.items()}
        return torch.func.functional_call(self.experts, merged, args, kwargs)


def _frozen(factor: Tensor, like: Tensor) -> nn.Parameter:
    return nn.Parameter(factor.to(like.device, like.dtype).contiguous(), requires_grad=False)


@dataclass
class JoinedStack:
    """Fused experts whose matrices have separate factors, as in checkpoints that store the experts one by one.

    names: per expert, the matrices stacked along its rows. ranks: of each matrix. factors: of the whole stack.
    """

    names: list[list[str]]
    ranks: Mapping[str, int]
    factors: Factors

    @classmethod
    def of(cls, parts: Mapping[str, ExpertSlice], factors: Mapping[str, Factors]) -> JoinedStack:
        """Join the slices of one parameter into one stack of factors; ungated matrices and unused ranks are zero.

        An expert's U is block-diagonal over its matrices, so that U diag(s) Vh stacks the matrices along the rows.
        """
        example = next(iter(parts.values()))
        experts, rows, inner = example.stack.weight.shape
        names = [["" for _ in range(example.parts)] for _ in range(experts)]
        of_matrix = {name: factors[name] for name in parts}
        for name, part in parts.items():
            if of_matrix[name].shape != (rows // example.parts, inner):
                shapes = f"{of_matrix[name].shape} do not fit a matrix of {(rows // example.parts, inner)}"
                raise AlignmentError(f"{name}: factors of shape {shapes}")
            names[part.expert][part.part] = name
        ranks = {name: matrix.s.shape[-1] for name, matrix in of_matrix.items()}
        width, height = max(ranks.values()), rows // example.parts
        U, Vh = torch.zeros(experts, rows, example.parts * width), torch.zeros(experts, example.parts * width, inner)
        for name, part in parts.items():
            column, row, rank = part.part * width, part.part * height, ranks[name]
            U[part.expert, row : row + height, column : column + rank] = of_matrix[name].U.float()
            Vh[part.expert, column : column + rank] = of_matrix[name].Vh.float()
        spectrum = torch.zeros(experts, example.parts * width)
        joined = replace(next(iter(of_matrix.values())), U=U, Vh=Vh, s=spectrum)
        return cls(names, ranks, joined)

    def spectrum(self, spectra: Mapping[str, Tensor]) -> Tensor:
        """[experts, width]: the matrices' spectra, side by side."""
        width = self.factors.s.shape[-1] // len(self.names[0])
        ungated = next(iter(spectra.values())).new_zeros(width)
        experts = [
            [pad(spectra[name], (0, width - self.ranks[name])) if name else ungated for name in of_expert]
            for of_expert in self.names
        ]
        return torch.stack([torch.cat(of_expert) for of_expert in experts])


class GatedLayers(dict[str, GatedLinear | GatedStack]):
    """The gated layers of a model by tensor name; their spectra are set together. `joined`: stacks whose name stands
    for several matrices."""

    def __init__(self) -> None:
        super().__init__()
        self.joined: dict[str, JoinedStack] = {}

    def add(self, other: GatedLayers) -> None:
        """Add the layers of `other`."""
        self.update(other)
        self.joined.update(other.joined)

    def set(self, spectra: Mapping[str, Tensor] | None) -> None:
        """Set every layer's spectrum; None turns all gates off: the model is then the original one."""
        for name, layer in self.items():
            spectrum = None
            if spectra is not None:
                spectrum = self.joined[name].spectrum(spectra) if name in self.joined else spectra[name]
            layer.spectrum = None if spectrum is None else spectrum.to(runs_on(layer.U))


def swap_in(
    model: nn.Module, projections: Mapping[str, Projection], factors: Mapping[str, Factors], backend: Backend = "auto"
) -> tuple[GatedLayers, list[tuple[nn.Module, str, nn.Module]]]:
    """Replace `projections` with gated layers; returns these, and (parent, key, original) of every swap.

    Factors are read one matrix at a time. Raises AlignmentError, with the model unchanged, when something does not fit.
    """
    parents = {id(child): (parent, key) for parent in model.modules() for key, child in parent.named_children()}
    modules: dict[int, tuple[nn.Module, dict[str, dict[str, Projection]]]] = {}
    for name, projection in projections.items():
        module, parameter = parameter_of(projection)
        if id(module) not in parents:
            raise AlignmentError(f"{name}: its layer is not part of the model")
        modules.setdefault(id(module), (module, {}))[1].setdefault(parameter, {})[name] = projection
    layers, swaps = GatedLayers(), []
    for module, parameters in modules.values():
        wrapper: GatedLinear | GatedExperts
        if isinstance(module, nn.Linear):
            (name,) = parameters["weight"]
            wrapper = layers[name] = GatedLinear(module, factors[name], backend)
        else:
            stacked: dict[str, Factors] = {}
            names = {parameter: next(iter(matrices)) for parameter, matrices in parameters.items()}
            for parameter, matrices in parameters.items():
                slices = {name: part for name, part in matrices.items() if isinstance(part, ExpertSlice)}
                if slices:
                    layers.joined[names[parameter]] = joined = JoinedStack.of(slices, factors)
                stacked[parameter] = joined.factors if slices else factors[names[parameter]]
            wrapper = GatedExperts(module, stacked)
            layers.update({name: wrapper.gated[parameter] for parameter, name in names.items()})
        swaps.append((*parents[id(module)], module, wrapper))
    for parent, key, _, wrapper in swaps:
        setattr(parent, key, wrapper)
    return layers, [(parent, key, module) for parent, key, module, _ in swaps]


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """Inside the context no parameter of the model requires a gradient; the flags are restored on exit."""
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        for parameter, _ in flags:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter, flag in flags:
            parameter.requires_grad_(flag)


@contextmanager
def gated(
    model: nn.Module, projections: Mapping[str, Projection], factors: Mapping[str, Factors], backend: Backend = "auto"
) -> Iterator[GatedLayers]:
    """Swap `projections` (tensor name → layer of `model`) for gated layers inside the context, gates off at first.

    Everything is put back on exit, also after an exception: the same layer objects, the same requires_grad flags.
    """
    with frozen(model):
        layers, swaps = swap_in(model, projections, factors, backend)
        try:
            yield layers
        finally:
            for parent, key, module in swaps:
                setattr(parent, key, module)


@contextmanager
def checkpointed(model: nn.Module, wanted: bool = True) -> Iterator[None]:
    """Inside the context, decoder layers keep only their input and are recomputed in the backward pass.

    This uses torch's checkpointing on each layer's forward pass: transformers' own switch works in training mode only,
    and gates are learned in evaluation mode, without dropout.
    """
    layers = list(text_model(model).layers) if wanted else []
    try:
        for layer in layers:
            layer.forward = partial(checkpoint, layer.forward, use_reentrant=False, preserve_rng_state=False)
        yield
    finally:
        for layer in layers:
            vars(layer).pop("forward", None)
