"""Sizes of the models in docs/scale.md. A test builds each model from its config and compares."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from vlmgraft.distillation.memory import Rank, Shapes


@dataclass(frozen=True)
class Model:
    """name; sizes of the language model (`Shapes`, whose `other_parameters` hold tower, embeddings and head); keys:
    width of keys and values; tower: parameters of the vision tower and projector."""

    name: str
    shapes: Shapes
    keys: int
    tower: int

    @classmethod
    def of(cls, name: str, config: Any) -> Model:
        """From a transformers config of a VLM, by building it on the meta device."""
        import torch
        from transformers import AutoModelForImageTextToText

        with torch.device("meta"):
            model = AutoModelForImageTextToText.from_config(config)
        shapes = Shapes.of(config)
        tower = sum(
            parameter.numel() for name, parameter in model.named_parameters() if "visual" in name or "vision" in name
        )
        return cls(name, shapes, shapes.width("k_proj"), tower)

    @property
    def parameters(self) -> int:
        """Number of parameters of the whole model."""
        return self.shapes.layers * self.shapes.layer_parameters + self.shapes.other_parameters

    @property
    def matrices(self) -> list[tuple[int, int, int]]:
        """(count, out, in) of all matrices of all layers, experts included."""
        layers = self.shapes.layers
        plain = [(layers, out, inner) for _, out, inner in self.shapes.projections]
        return plain + [(layers * count, out, inner) for count, out, inner in self.shapes.experts]

    @property
    def merged(self) -> int:
        """Elements of the matrices that are merged: attention and MLP of every layer."""
        return sum(count * out * inner for count, out, inner in self.matrices)

    @property
    def active(self) -> int:
        """Elements of the merged matrices that one token uses."""
        shapes = self.shapes
        plain = sum(out * inner for _, out, inner in shapes.projections)
        return shapes.layers * (plain + sum(shapes.active * out * inner for _, out, inner in shapes.experts))

    def directions(self, rank: Rank) -> int:
        """Number of gates: kept singular directions of all matrices."""
        return sum(count * kept(out, inner, rank) for count, out, inner in self.matrices)

    def factors(self, rank: Rank) -> int:
        """Numbers in U and Vh of all matrices."""
        return sum(count * kept(out, inner, rank) * (out + inner) for count, out, inner in self.matrices)


def kept(out: int, inner: int, rank: Rank) -> int:
    """Directions that a decomposition to `rank` keeps."""
    return min(out, inner) if rank == "full" else min(rank, out, inner)


def _dense(name: str, sizes: tuple[int, int, int, int, int, int], layer: int, tower: int, other: int) -> Model:
    """hidden, feed-forward, width of keys, heads, layers, vocabulary; parameters of a layer, the tower, all others."""
    hidden, feed, keys, heads, layers, vocabulary = sizes
    wide = (("q_proj", hidden, hidden), ("k_proj", keys, hidden), ("v_proj", keys, hidden), ("o_proj", hidden, hidden))
    deep = (("gate_proj", feed, hidden), ("up_proj", feed, hidden), ("down_proj", hidden, feed))
    return Model(name, Shapes(layers, layer, other, wide + deep, hidden, heads, vocabulary), keys, tower)


_MOE = Shapes(
    48, 623_120_640, 1_160_963_312,
    (("q_proj", 4096, 2048), ("k_proj", 512, 2048), ("v_proj", 512, 2048), ("o_proj", 2048, 4096)),
    2048, 32, 151_936, ((128, 1536, 2048), (128, 2048, 768)), 8,
)  # fmt: skip

MODELS = (
    _dense("Qwen2.5-VL-3B", (2048, 11008, 256, 16, 36, 151_936), 77_076_992, 668_684_288, 979_851_264),
    _dense("Qwen2.5-VL-7B", (3584, 18944, 512, 28, 28, 152_064), 233_057_792, 676_550_144, 1_766_548_480),
    _dense("Qwen2.5-VL-32B", (5120, 27648, 1024, 40, 64, 152_064), 487_605_248, 688_841_984, 2_245_982_464),
    _dense("Qwen2.5-VL-72B", (8192, 29568, 1024, 64, 80, 152_064), 877_684_736, 704_573_696, 3_195_998_464),
    Model("Qwen3-VL-30B-A3B", _MOE, 512, 538_631_408),
)
"""The last three numbers of a dense model: parameters of a layer, of the tower, and of all that is in no layer."""
