"""A merge in memory: the same calls as the engine's, on dictionaries of tensors, with chunks as small as one likes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from vlmgraft.methods.base import TensorContext, check_numbers

SHAPES: dict[str, tuple[int, ...]] = {
    "model.layers.0.self_attn.q_proj.weight": (9, 7),
    "model.layers.0.mlp.up_proj.weight": (12, 7),
    "model.layers.1.self_attn.q_proj.weight": (9, 7),
    "model.layers.1.mlp.experts.down_proj": (2, 7, 5),
    "model.layers.2.mlp.up_proj.weight": (12, 7),
}


def context_of(name: str, shape: tuple[int, ...], layers: int = 3) -> TensorContext:
    layer = int(name.split(".")[2]) if ".layers." in name else None
    group = "attention" if "attn" in name else "mlp" if "mlp" in name else "norm"
    return TensorContext(name, shape, layers, layer, group)


@dataclass(frozen=True)
class Fake:
    """Models by role, each {name: float32 tensor}; `chunk` elements at a time."""

    models: Mapping[str, Mapping[str, Tensor]]
    chunk: int = 16
    may_guess: bool = False

    @property
    def names(self) -> list[str]:
        return list(self.models["vlm"])

    def context(self, name: str) -> TensorContext:
        return context_of(name, tuple(self.models["vlm"][name].shape))

    def tensors(self) -> Iterator[tuple[TensorContext, Callable[[str], Tensor]]]:
        for name in self.names:
            yield self.context(name), lambda key, n=name: self.models[key][n].clone()

    def chunks(self) -> Iterator[tuple[TensorContext, Mapping[str, Tensor]]]:
        for name in self.names:
            flat = {key: model[name].flatten() for key, model in self.models.items()}
            for start in range(0, flat["vlm"].numel(), self.chunk):
                yield (
                    replace(self.context(name), start=start),
                    {k: one[start : start + self.chunk].clone() for k, one in flat.items()},
                )

    def map(self, function: Callable[..., Any], *, sample: int = 1) -> Iterator[tuple[TensorContext, Any]]:
        for context, every in self.chunks():
            pieces = {key: piece[: -(-len(piece) // sample)] for key, piece in every.items()}
            result = function(pieces, context)
            for piece in pieces.values():
                piece.fill_(torch.nan)
            yield context, result

    @property
    def alignment(self) -> Any:
        """As much of an alignment as `check_numbers` looks at."""
        contexts = [self.context(name) for name in self.names]
        merged = tuple(SimpleNamespace(name=c.name, layer=c.layer, group=c.group) for c in contexts)
        vlm = SimpleNamespace(tensors={c.name: SimpleNamespace(shape=c.shape) for c in contexts})
        return SimpleNamespace(merged=merged, layers=3, vlm=vlm, path=Path("vlm"))

    def tau(self, key: str = "donor") -> dict[str, Tensor]:
        base = {"donor": "donor_base", "vlm": "vlm_base"}[key]
        return {name: self.models[key][name] - self.models[base][name] for name in self.names}


def models(seed: int = 0, shapes: Mapping[str, tuple[int, ...]] = SHAPES, *, low: bool = True) -> dict[str, Any]:
    """VLM, donor and bases near each other; bfloat16 values when `low`, so that equal magnitudes occur."""
    generator = torch.Generator().manual_seed(seed)
    base = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    found = {"vlm_base": base}
    for key, amount in (("vlm", 0.3), ("donor_base", 0.1), ("donor", 0.4)):
        found[key] = {n: one + amount * torch.randn(one.shape, generator=generator) for n, one in base.items()}
    if low:
        found = {key: {n: one.bfloat16().float() for n, one in model.items()} for key, model in found.items()}
    return found


def run(method: Any, fake: Fake) -> dict[str, Tensor]:
    """Check, prepare, stream: {name: merged float32 tensor}."""
    check_numbers(method, fake.alignment)
    method = method.prepare(fake)
    merged = {name: torch.full(one.shape, torch.nan) for name, one in fake.models["vlm"].items()}
    if method.whole_tensors:
        for context, load in fake.tensors():
            merged[context.name] = method.apply({key: load(key) for key in fake.models}, context)
        return merged
    for context, pieces in fake.chunks():
        piece = method.apply(pieces, context)
        merged[context.name].view(-1)[context.start : context.start + len(piece)] = piece
    return merged


@dataclass
class Counted:
    """Passes that count how often they are begun."""

    fake: Fake
    begun: int = 0

    def map(self, function: Callable[..., Any]) -> Iterator[tuple[TensorContext, Any]]:
        self.begun += 1
        return self.fake.map(function)
