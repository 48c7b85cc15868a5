"""What a method makes of an alignment's tensors, in memory: no checkpoint is written, no model is loaded again."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from typing import Any

from jaxtyping import Float
from torch import Tensor

from vlmgraft.alignment import Alignment
from vlmgraft.checkpoint.reader import Reader
from vlmgraft.merging.pieces import Inputs, Lane, MergedPasses
from vlmgraft.merging.plan import check_needs
from vlmgraft.methods.base import check_numbers, number_for
from vlmgraft.methods.frism import fold
from vlmgraft.methods.spectral import Spectral
from vlmgraft.spectral.factors import Factors


class Rebuilder:
    """Context manager: merged tensors of one alignment, for one method after the other.

    factors: of the donor's task vector by VLM tensor name; where given, a `spectral` method that only
    changes the spectrum is rebuilt from them in place of a decomposition of its own.
    """

    def __init__(self, alignment: Alignment, factors: Mapping[str, Factors] | None = None) -> None:
        self.alignment, self.factors = alignment, factors
        self._stack = ExitStack()

    def __enter__(self) -> Rebuilder:
        keys = ("vlm", "donor", "donor_base", "vlm_base")
        opened = {key: source for key in keys if (source := getattr(self.alignment, key)) is not None}
        readers = {key: self._stack.enter_context(Reader(source)) for key, source in opened.items()}
        self._inputs = Inputs(self.alignment, readers)
        self._inputs.lanes.put(Lane(opened))
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def weights(self, method: Any) -> dict[str, Tensor]:
        """Role → merged tensor, float32 and in its shape; tensors that the method leaves as they are are left out.

        Raises:
            RecipeError, AlignmentError: the method does not fit. WeightsError: an input is not finite.
        """
        check_numbers(method, self.alignment)
        check_needs(self.alignment, method)
        if isinstance(method, Spectral) and method.diagonal and self.factors is not None:
            return dict(self._from_factors(method, self.factors))
        with ThreadPoolExecutor(1) as pool:
            method = method.prepare(MergedPasses(self._inputs, pool, 1))
        return dict(self._combined(method))

    def _combined(self, method: Any) -> Iterator[tuple[str, Tensor]]:
        for tensor in self.alignment.merged:
            _, pieces = self._inputs.whole(tensor)
            self._inputs.check(tensor, pieces)
            shape = pieces["vlm"].shape
            if not method.whole_tensors:
                pieces = {key: piece.reshape(-1) for key, piece in pieces.items()}
            merged = method.apply(pieces, self._inputs.context(tensor))
            if merged is not pieces["vlm"]:
                yield str(tensor.role), merged.reshape(shape)

    def _from_factors(self, method: Spectral, factors: Mapping[str, Factors]) -> Iterator[tuple[str, Tensor]]:
        for tensor in self.alignment.merged:
            scale, matrix = number_for(method.scale, self._inputs.context(tensor), "scale"), factors[tensor.name]
            if scale != 0:
                yield str(tensor.role), self._folded(matrix, scale * method.spectrum(matrix.s, matrix.energy))

    def with_spectra(
        self, spectra: Mapping[str, Float[Tensor, " r"]], factors: Mapping[str, Factors] | None = None
    ) -> dict[str, Tensor]:
        """Role → W_vlm + U diag(spectrum) Vh in float32, with one spectrum per VLM tensor name, such as gates give.

        factors: those that the spectra belong to, if they are not this object's.
        """
        matrices = factors or self.factors or {}
        merged = [tensor for tensor in self.alignment.merged if tensor.name in spectra]
        return {str(tensor.role): self._folded(matrices[tensor.name], spectra[tensor.name]) for tensor in merged}

    def _folded(self, factors: Factors, spectrum: Float[Tensor, " r"]) -> Tensor:
        return fold(self._inputs.readers["vlm"].tensor(factors.name), factors, spectrum)
