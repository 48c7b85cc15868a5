"""Merging in memory: a method's tensors are swapped into a loaded model; no checkpoint is written, no model reloaded.

The weights of a model are swapped by role, inside a context. A role is a tensor's name inside the text model in Llama's
naming, such as "layers.3.self_attn.q_proj.weight". It is the end of the tensor's name on disk and of its parameter's
name in every family in which each tensor belongs to a module of its own.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from typing import Any

from jaxtyping import Float
from torch import Tensor, nn

from vlmgraft.alignment import Alignment
from vlmgraft.alignment.view import text_view
from vlmgraft.checkpoint.index import Checkpoint
from vlmgraft.checkpoint.reader import Reader
from vlmgraft.errors import AlignmentError
from vlmgraft.hf.modules import text_model
from vlmgraft.merging.pieces import Inputs, MergedPasses, Workspace
from vlmgraft.merging.plan import check_needs
from vlmgraft.methods.base import check_numbers, number_for
from vlmgraft.methods.frism import fold
from vlmgraft.methods.spectral import Spectral
from vlmgraft.spectral.factors import Factors


class Rebuilder:
    """Context manager: computes the merged tensors of one alignment, for one method after the other.

    factors: of the donor's task vector, by VLM tensor name. If given, a `spectral` method that only changes the
    spectrum uses them instead of a decomposition of its own.
    """

    def __init__(self, alignment: Alignment, factors: Mapping[str, Factors] | None = None) -> None:
        self.alignment, self.factors = alignment, factors
        self._stack = ExitStack()

    def __enter__(self) -> Rebuilder:
        opened = self.alignment.opened
        readers = {key: self._stack.enter_context(Reader(source)) for key, source in opened.items()}
        self._inputs = Inputs(self.alignment, readers)
        self._inputs.workspaces.put(Workspace(opened))
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def weights(self, method: Any) -> dict[str, Tensor]:
        """Role → merged float32 tensor in the VLM's shape; tensors that the method does not change are omitted.

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
        """Role → W_vlm + U diag(spectrum) Vh in float32; spectra: one per VLM tensor name, for example from gates.

        factors: those that the spectra belong to, if not this object's own.
        """
        matrices = factors or self.factors or {}
        merged = [tensor for tensor in self.alignment.merged if tensor.name in spectra]
        return {str(tensor.role): self._folded(matrices[tensor.name], spectra[tensor.name]) for tensor in merged}

    def _folded(self, factors: Factors, spectrum: Float[Tensor, " r"]) -> Tensor:
        return fold(self._inputs.readers["vlm"].tensor(factors.name), factors, spectrum)


def text_parameters(model: Any) -> dict[str, nn.Parameter]:
    """Role → parameter of the text model; a tied head shares the embeddings' parameter and is not listed."""
    text = text_model(model)
    parameters = dict(text.named_parameters())
    head = model.get_output_embeddings()
    if head is not None and head.weight is not text.embed_tokens.weight:
        parameters["lm_head.weight"] = head.weight
    return parameters


@contextmanager
def swapped(parameters: Mapping[str, nn.Parameter], weights: Mapping[str, Tensor]) -> Iterator[None]:
    """Inside the context the model has `weights` (role → tensor), cast to its dtype, in place of its own.

    On exit, also after an exception, the parameters refer to their original memory again. Raises AlignmentError where
    the model has no parameter of a role and shape.
    """
    before: dict[str, Tensor] = {}
    for role, weight in weights.items():
        parameter, stored = parameters.get(role), tuple(weight.shape)
        if parameter is None or tuple(parameter.shape) != stored:
            held = "has none" if parameter is None else f"holds it as {tuple(parameter.shape)}"
            raise AlignmentError(
                f"{role}: stored as {stored}, and the loaded model {held}; its weights cannot be exchanged in memory"
            )
        before[role] = parameter.data
    try:
        for role, old in before.items():
            parameters[role].data = weights[role].detach().to(old.device, old.dtype)
        yield
    finally:
        for role, old in before.items():
            parameters[role].data = old


class StoredWeights(Mapping[str, Tensor]):
    """Role → tensor of a checkpoint's text model, read from disk on access; use it in a `with` statement."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.names = {held.role: name for name, held in text_view(checkpoint).held.items()}
        self._reader = Reader(checkpoint)

    def __getitem__(self, role: str) -> Tensor:
        return self._reader.tensor(self.names[role])

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)

    def __enter__(self) -> StoredWeights:
        return self

    def __exit__(self, *_: object) -> None:
        self._reader.__exit__(None, None, None)
