"""Knock-out: what each layer carries, before and after merging (Bring Reason to Vision, arXiv 2505.05464).

A cell is one layer × part × mode on one model. All cells use one loaded model, the merged one; the VLM's weights are
swapped in where the VLM itself is examined. The modes change a layer's attention or feed-forward block:

| mode     | what the block becomes                                                                          |
|----------|-------------------------------------------------------------------------------------------------|
| constant | every entry of its projections is 1/d_out, as in the code of Bring Reason to Vision (2505.05464) |
| zero     | every entry of its projections is 0: the layer passes its input on                              |
| mean     | its output is its own mean over prompts, at every position (mean ablation)                      |
| restore  | its weights are the VLM's: this block is un-merged                                              |
| only     | its weights are the merged ones, all other weights are the VLM's                                |

The first two leave biases and norms unchanged. d_out is the number of rows of a projection.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor, nn

from vlmgraft.alignment.view import group_of
from vlmgraft.analysis.bench import REMEDY, Bench, load_bench
from vlmgraft.analysis.eval_data import EvalData, layer_list
from vlmgraft.analysis.in_memory import StoredWeights, swapped, text_parameters
from vlmgraft.analysis.scores import change
from vlmgraft.checkpoint.index import open_checkpoint
from vlmgraft.errors import AlignmentError, RecipeError
from vlmgraft.hf.batches import Question, batches, encode, to_device
from vlmgraft.hf.modules import hook_states, text_model
from vlmgraft.hf.placement import threads_of
from vlmgraft.recipe.source import located, read_mapping
from vlmgraft.storage.listed import listed
from vlmgraft.storage.locks import at_work
from vlmgraft.storage.progress import Progress

Part = Literal["attention", "mlp", "both"]
Mode = Literal["constant", "zero", "mean", "restore", "only"]
PARTS: tuple[Part, ...] = get_args(Part)
MODES: tuple[Mode, ...] = get_args(Mode)
NEED_VLM: tuple[Mode, ...] = ("restore", "only")

Block = tuple[int, str]
"""Layer and "attention" or "mlp"."""
Means = Mapping[Block, Float[Tensor, " hidden"]]


class Blocks:
    """The blocks of one model in memory. vlm: the VLM's weights by role, for the modes that put them back."""

    def __init__(self, model: Any, vlm: Mapping[str, Tensor] | None = None) -> None:
        self.model, self.vlm = model, vlm
        self.parameters = text_parameters(model)
        self.depth = len(text_model(model).layers)

    @contextmanager
    def knocked_out(self, layer: int, part: Part, mode: Mode, means: Means | None = None) -> Iterator[None]:
        """Change one block, or both of a layer, inside the context; the model is always restored bit for bit on exit.

        Raises:
            RecipeError: no such layer, part or mode, or the mode needs the VLM's weights or means that are not given.
        """
        self._check(layer, part, mode, means)
        blocks = [(layer, name) for name in PARTS[:2] if part in (name, "both")]
        with ExitStack() as stack:
            if mode == "mean":
                for block in blocks:
                    mean = (means or {})[block]
                    stack.enter_context(hook_states(self.module(block), partial(_everywhere, mean)))
            else:
                stack.enter_context(swapped(self.parameters, self._weights(blocks, mode)))
            yield

    def _check(self, layer: int, part: Part, mode: Mode, means: Means | None) -> None:
        if not 0 <= layer < self.depth:
            raise RecipeError(f"layer {layer}: the model has layers 0 to {self.depth - 1}")
        if part not in PARTS or mode not in MODES:
            raise RecipeError(f"{part} {mode}: parts are {', '.join(PARTS)}; modes are {', '.join(MODES)}")
        if mode in NEED_VLM and self.vlm is None:
            raise RecipeError(f"mode {mode} puts weights of the VLM back: name the VLM that the model was merged from")
        if mode == "mean" and means is None:
            raise RecipeError("mode mean needs the blocks' means over prompts, see `block_means`")

    def _weights(self, blocks: Sequence[Block], mode: Mode) -> dict[str, Tensor]:
        if mode in ("constant", "zero"):
            inside = {role: weight.data for block in blocks for role, weight in self._projections(block).items()}
            fill = {role: 1 / weight.shape[-2] if mode == "constant" else 0.0 for role, weight in inside.items()}
            return {role: torch.full_like(weight, fill[role]) for role, weight in inside.items()}
        vlm = self.vlm or {}
        merged = {role for layer, name in blocks for role in self.parameters if role.startswith(_inside(layer, name))}
        if mode == "restore":
            return {role: vlm[role] for role in self.parameters if role in merged and role in vlm}
        return {role: vlm[role] for role in self.parameters if role not in merged and role in vlm}

    def _projections(self, block: Block) -> dict[str, nn.Parameter]:
        """The matrices of a block, without norms, biases and routers."""
        layer, name = block
        matrices = {
            role: weight
            for role, weight in self.parameters.items()
            if role.startswith(f"layers.{layer}.") and group_of(role) == name and weight.ndim > 1
        }
        if not matrices:
            raise AlignmentError(f"layer {layer} of {type(self.model).__name__}: no projection is recognised as {name}")
        return matrices

    def module(self, block: Block) -> nn.Module:
        """The module of a block."""
        return text_model(self.model).get_submodule(_inside(*block).rstrip("."))

    @torch.no_grad()
    def means(self, processor: Any, prompts: Sequence[Question], batch_size: int = 16) -> dict[Block, Tensor]:
        """The mean output of every block over the tokens of prompts, padding left out, float32 [hidden].

        Raises:
            AlignmentError: the model's sequence length is not the processor's, so padding cannot be identified.
        """
        sums: dict[Block, Tensor] = {}
        tokens = 0
        mask = torch.empty(0, 0, dtype=torch.bool)

        def collect(block: Block, states: Tensor) -> None:
            if states.shape[:2] != mask.shape:
                raise AlignmentError(
                    f"{type(self.model).__name__}: {tuple(mask.shape)} tokens went in, layers see "
                    f"{tuple(states.shape[:2])}; mode mean cannot tell padding apart, leave it out"
                )
            sums[block] = sums.get(block, 0) + states[mask].float().sum(0)

        with ExitStack() as stack:
            stack.enter_context(threads_of(self.model))
            for block in [(layer, name) for layer in range(self.depth) for name in PARTS[:2]]:
                stack.enter_context(hook_states(self.module(block), partial(collect, block)))
            for indices in batches(prompts, batch_size):
                batch = encode(processor, [prompts[index] for index in indices])
                inputs = to_device(batch, self.model.device, self.model.dtype)
                mask = inputs["attention_mask"].bool()
                tokens += int(mask.sum())
                self.model(**inputs)
        return {block: total / tokens for block, total in sums.items()}


def _everywhere(mean: Float[Tensor, " hidden"], states: Tensor) -> Tensor:
    return mean.to(states).expand_as(states)


def _inside(layer: int, name: str) -> str:
    return f"layers.{layer}.{'self_attn' if name == 'attention' else 'mlp'}."


Cell = Mapping[str, Any]
KEYS = ("model", "layer", "part", "mode")
INTACT: Cell = {"layer": None, "part": "both", "mode": "intact"}
VLM, MERGED, ALONE = "VLM", "merged", "model"


def knockout(
    model: str | Path,
    out: str | Path,
    data: EvalData | None = None,
    *,
    vlm: str | None = None,
    alone: bool = False,
    layers: str | Sequence[int] | None = None,
    parts: Sequence[Part] = PARTS,
    modes: Sequence[Mode] = MODES,
    resume: bool = False,
    progress: Progress | None = None,
) -> list[dict[str, Any]]:
    """Knock out every layer × part in every mode; rows in `out`/knockout.jsonl. One model is loaded, once.

    Args:
        vlm: the VLM that `model` was merged from; it is examined too, and `restore` and `only` use its weights;
            default: the one named in the recipe.yaml of the merged folder. alone: examine `model` by itself.
    Raises:
        RecipeError, DataError, CheckpointError, OutputError: before the first cell.
    """
    data, out = data or EvalData(), Path(out)
    source = None if alone else vlm or _vlm_of(Path(model))
    checkpoint = open_checkpoint(source) if source else None
    with ExitStack() as stack:
        stack.enter_context(at_work(out, "knocking out", REMEDY, [model, source or model], ["knockout.*"]))
        models = [checkpoint.path] if checkpoint else []
        more: dict[str, Any] = {"models": models, "kl": False, "resume": resume, "progress": progress}
        bench = load_bench(model, data, out, settings={"model": str(model), "vlm": source}, **more)
        evaluator: Any = bench.evaluator
        weights = stack.enter_context(StoredWeights(checkpoint)) if checkpoint else None
        prompts = data.prompts(evaluator.suite) if "mean" in listed(modes) else []
        cells = Knockout(bench, vlm=weights, prompts=prompts)
        return cells.run(layers=layer_list(layers, cells.blocks.depth), parts=listed(parts), modes=listed(modes))


def _vlm_of(model: Path) -> str | None:
    """The VLM of a merged folder, as its recipe names it."""
    recipe = model / "recipe.yaml"
    named = read_mapping(recipe).get("vlm") if recipe.is_file() else None
    try:
        return named and located({"vlm": named}, model)["vlm"]
    except RecipeError:
        raise RecipeError(f"{recipe}: its VLM was {named}, which is not here; say where it is with --vlm") from None


def knockout_cells(
    layers: Iterable[int], parts: Sequence[Part] = PARTS, modes: Sequence[Mode] = MODES, *, both_models: bool
) -> list[dict[str, Any]]:
    """All cells, the intact models first. `restore` and `only` apply only to a merged model examined beside its VLM."""
    models = [VLM, MERGED] if both_models else [ALONE]
    knocked_out = [
        {"model": model, "layer": layer, "part": part, "mode": mode}
        for model in models
        for mode in modes
        if model == MERGED or mode not in NEED_VLM
        for part in parts
        for layer in layers
    ]
    return [*({"model": model, **INTACT} for model in models), *knocked_out]


class Knockout:
    """The model on a bench and the VLM it came from.

    vlm: the VLM's weights by role; None when the model is examined alone (its rows then say "model").
    prompts: for mode `mean`, which averages each block's output over them.
    """

    def __init__(
        self, bench: Bench, *, vlm: Mapping[str, Tensor] | None = None, prompts: Sequence[Question] = ()
    ) -> None:
        self.bench, self.blocks = bench, Blocks(bench.model, vlm)
        self.vlm, self.prompts = vlm, prompts
        self._means: dict[str, Means] = {}

    def run(
        self, *, layers: Sequence[int] | None = None, parts: Sequence[Part] = PARTS, modes: Sequence[Mode] = MODES
    ) -> list[dict[str, Any]]:
        """Measure all cells, write them to knockout.jsonl and return the rows.

        A row has the accuracies of its cell and their change from the intact model. `only`, which is the VLM with one
        merged block, is compared with the intact VLM.

        Raises:
            RecipeError: no such layer, or an input that a mode needs is missing. OutputError: as `CellLog`.
        """
        if "mean" in modes and not self.prompts:
            raise RecipeError("mode mean needs prompts to average over; give some, or leave the mode out")
        chosen = range(self.blocks.depth) if layers is None else layers
        for layer in chosen:
            if not 0 <= layer < self.blocks.depth:
                raise RecipeError(f"layer {layer}: the model has layers 0 to {self.blocks.depth - 1}")
        cells = knockout_cells(chosen, parts, modes, both_models=self.vlm is not None)
        rows: list[dict[str, Any]] = []
        for row in self.bench.measure("knockout", KEYS, cells, lambda cell: self._measure(cell, rows)):
            rows.append(row)
        return rows

    def _measure(self, cell: Cell, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        with ExitStack() as stack:
            if cell["model"] == VLM and self.vlm is not None:
                roles = [role for role in self.blocks.parameters if role in self.vlm]
                stack.enter_context(swapped(self.blocks.parameters, {role: self.vlm[role] for role in roles}))
            if cell["mode"] != "intact":
                means = self._block_means(cell["model"]) if cell["mode"] == "mean" else None
                stack.enter_context(self.blocks.knocked_out(cell["layer"], cell["part"], cell["mode"], means))
            scores = self.bench.ask()
        if cell["mode"] == "intact":
            return scores
        against = VLM if cell["mode"] == "only" else cell["model"]
        intact = next(row for row in rows if row["model"] == against and row["mode"] == "intact")
        changes = {
            f"{kind}_change": asdict(change(intact["right"], scores["right"], getattr(self.bench.evaluator, kind)))
            for kind in ("reasoning", "perception")
        }
        return {**scores, **changes, "against": against}

    def _block_means(self, model: str) -> Means:
        """Block means with the current weights, computed once per model; the caller has swapped its weights in."""
        if model not in self._means:
            self._means[model] = self.blocks.means(self.bench.processor, self.prompts)
        return self._means[model]
