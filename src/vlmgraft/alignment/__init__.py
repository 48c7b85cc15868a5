"""Which tensor of a VLM pairs with which tensors of the donor and the bases, decided from headers alone."""

from __future__ import annotations

from vlmgraft.alignment.align import AlignedTensor, Alignment, align
from vlmgraft.alignment.families import Place
from vlmgraft.alignment.layouts import Layout, Source, assemble

__all__ = ["AlignedTensor", "Alignment", "Layout", "Place", "Source", "align", "assemble"]
