"""Curvature gates: choose the directions to open by one pass over the calibration set, without training.

To second order, opening direction i by c_i costs a KL divergence of ½ λ² c_i² h_i, with the Fisher matrix's diagonal

    h_i = E[ (Σ_t (δ_t · u_i)(x_t · v_i) · s_i)² ]                            per answer token

x_t is the layer's input and δ_t the gradient of −log p at its output, for a token drawn from the teacher at each answer
position. Scores of different positions are uncorrelated: the square of a question's sum estimates the sum of squares.
For linear layers the scores come from the inputs and the gradients at the outputs, in one backward pass per batch. For
fused experts the model decides which tokens reach a matrix. There a score is s_i times the gradient of the question's
loss with respect to the spectrum at zero: the same number, but with one backward pass per question.
Directions open in the order of h_i / s_i² (KL per injected energy) until the KL measured on held-out prompts reaches a
budget.

Soft gates come from the same h with another injection term, the distance to the whole task vector: the minimum of
Σ ½ λ² c_i² h_i + α (1 − c_i)² s_i² is c_i = 1 / (1 + (h_i/s_i²) / cut) with cut = 2α/λ², so that σ(g) = c for
g = log(cut · s_i²/h_i). Training can start from soft gates and move them; it cannot move hard gates.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from vlmgraft.distillation.distributed import of_all, shared
from vlmgraft.distillation.gated_layers import GatedLinear, checkpointed
from vlmgraft.distillation.targets import TargetBatch, Targets
from vlmgraft.methods.frism import check_budget
from vlmgraft.spectral.gates import Gates, injected_energy

if TYPE_CHECKING:
    from vlmgraft.data.questions import Question
    from vlmgraft.distillation.distill import Distiller

BISECTIONS = 14
REACH = 3.0
"""Logits of a warm start are kept within ±3: σ' is 0.045 there, so that every gate can still move."""
START_REACH = 2.0
"""Logits of a curvature start are kept within ±2: gates between 0.12 and 0.88, which training still moves."""


@dataclass(frozen=True)
class FisherDiagonal:
    """h per tensor, [r] or [experts, r] for fused experts, float32 on the CPU; in nats per answer token at λ = 1,
    averaged over `tokens` tokens."""

    h: Mapping[str, Float[Tensor, " r"]]
    tokens: int

    def thresholds(self, s: Mapping[str, Float[Tensor, " r"]]) -> dict[str, Float[Tensor, " r"]]:
        """h_i / s_i² per direction; infinite where s_i is zero, so that empty directions stay closed."""
        result = {}
        for name, h in self.h.items():
            energy = s[name].float().cpu().square()
            result[name] = torch.where(energy > 0, h / energy.clamp_min(1e-30), torch.inf)
        return result

    def cut(
        self,
        s: Mapping[str, Float[Tensor, " r"]],
        scale: float,
        cut: float,
        settings: Mapping[str, Any] | None = None,
        *,
        soft: bool = False,
    ) -> Gates:
        """Directions with h/s² ≤ cut fully open and the others closed, or (soft) each open by 1 / (1 + h/(s² cut))."""
        logits = {}
        for name, value in self.thresholds(s).items():
            if soft:
                opened = (cut / value.clamp_min(1e-30)).log()
            else:
                opened = torch.where((value <= cut) & value.isfinite(), torch.inf, -torch.inf)
            logits[name] = opened
        gates = Gates(logits, scale)
        energy = injected_energy(gates, {name: s[name].cpu() for name in logits})
        return replace(gates, settings={"inject": "curvature", "energy": energy, **(settings or {})})


def estimate_curvature(
    distiller: Distiller, *, draws: int = 1, seed: int = 0, checkpointing: bool = False
) -> FisherDiagonal:
    """h of every direction, from `draws` passes over the distiller's calibration set; the model is left as it was.

    checkpointing: recompute decoder layers in the backward pass instead of keeping their activations; h is the same.

    Under torch.distributed the batches are divided among the processes. Every process gets the whole h, bit-identical
    to that of a single process.

    The forward passes of the teacher's targets are not reused: they run without gradients, before factors are attached,
    and are skipped when cached. Whether layers must be checkpointed is known only once all batches are. Reuse would
    save one of two forward passes, in a first run only.
    """
    shapes = {name: factor.s.shape for name, factor in distiller.factors.items()}
    linear = all(isinstance(layer, nn.Linear | GatedLinear) for layer in distiller.linears.values())
    scores = tapped_scores if linear else question_gradients
    batches = distiller.targets.batches * draws
    seeds = torch.randint(2**62, (len(batches),), generator=torch.Generator().manual_seed(seed)).tolist()
    h = torch.zeros(sum(shape.numel() for shape in shapes.values()), device=distiller.model.device)
    with scores(distiller, checkpointing) as scored:
        for (batch, drawn), counts in shared([*zip(batches, seeds, strict=True)]):
            squares = {name: h.new_zeros(shape) for name, shape in shapes.items()}
            for name, score in scored(batch, torch.Generator().manual_seed(drawn)):
                squares[name] += score.square().sum(0)
            for part in of_all(counts * torch.cat([square.flatten() for square in squares.values()])):
                h += part
    tokens = sum(int(batch.predicts.sum()) for batch in batches)
    parts = (h / tokens).cpu().split([shape.numel() for shape in shapes.values()])
    means = {name: part.view(shape).clone() for (name, shape), part in zip(shapes.items(), parts, strict=True)}
    return FisherDiagonal(means, tokens)


def curvature_gates(
    distiller: Distiller,
    scale: float,
    kl_budget: float,
    *,
    curvature: FisherDiagonal | None = None,
    held_out: Sequence[Question] | Targets | None = None,
    soft: bool = False,
) -> Gates:
    """Hard (or soft) gates in curvature order whose *measured* held-out KL is the largest within the budget.

    The diagonal ignores interactions between directions, so it determines only the order; the KL is measured, about 14
    times. held_out: questions or targets, by default the distiller's own.
    """
    check_budget(kl_budget)
    curvature = estimate_curvature(distiller) if curvature is None else curvature
    s = {name: factors.s for name, factors in distiller.factors.items()}  # factors may be on disk: read each once
    cuts = _cuts(curvature, s, soft)
    low, high, best, reached = -1, len(cuts) - 1, 0.0 if soft else -1.0, 0.0
    with distiller.measuring(held_out) as measure:
        for _ in range(BISECTIONS):
            if low >= high:
                break
            middle = (low + high + 1) // 2
            gates = curvature.cut(s, scale, float(cuts[middle]), soft=soft)
            kl = measure({name: gates.spectrum(name, s[name]) for name in s})
            if kl <= kl_budget:
                low, best, reached = middle, float(cuts[middle]), kl
            else:
                high = middle - 1
    settings = {"kl_budget": kl_budget, "held_out_kl": reached, "cut": best}
    return replace(curvature.cut(s, scale, best, settings, soft=soft), factors=distiller.digest)


def within_reach(gates: Gates, limit: float = REACH) -> Gates:
    """The same gates with logits kept within ±limit, as a start that training can move."""
    return replace(gates, logits={name: value.clamp(-limit, limit) for name, value in gates.logits.items()})


def curvature_start(distiller: Distiller, scale: float, kl_budget: float, *, curvature: FisherDiagonal) -> Gates:
    """Start of training instead of half-open gates: soft gates at the budget, clamped so that they can still move."""
    return within_reach(curvature_gates(distiller, scale, kl_budget, curvature=curvature, soft=True), START_REACH)


def _cuts(curvature: FisherDiagonal, s: Mapping[str, Tensor], soft: bool) -> Float[Tensor, " cuts"]:
    """Candidate cuts in ascending order: the values at which a direction opens, or for soft gates a fine geometric grid
    from a thousandth of the smallest threshold to a thousand times the largest."""
    values = torch.cat([value.flatten() for value in curvature.thresholds(s).values()])
    positive = values[values.isfinite() & (values > 0)].unique()
    if not soft or not len(positive):
        return values[values.isfinite()].unique()
    return torch.logspace(float(positive[0].log10()) - 3, float(positive[-1].log10()) + 3, 2**BISECTIONS - 1)


Scored = Callable[[TargetBatch, torch.Generator], Iterator[tuple[str, Tensor]]]
"""Yields pairs (tensor name, scores [questions, r]) of one batch; a tensor may be yielded in several parts."""


@contextmanager
def tapped_scores(distiller: Distiller, checkpointing: bool = False) -> Iterator[Scored]:
    """Scores of linear layers, from their inputs and the gradients at their outputs: one backward pass per batch.

    U and Vh are read from gated layers, swapped in once: on the device or, in a sharded or offloaded model, placed like
    its weights, with each process's rows. Layers round to the model's dtype; finer factors are read every time.
    """
    with distiller.gated() as layers, checkpointed(distiller.model, checkpointing):
        s, finer = dict[str, Tensor](), set[str]()
        for name, factors in distiller.factors.items():
            s[name] = factors.s.float().to(distiller.model.device)
            if torch.promote_types(factors.U.dtype, distiller.model.dtype) != distiller.model.dtype:
                finer.add(name)

        def scored(batch: TargetBatch, generator: torch.Generator) -> Iterator[tuple[str, Tensor]]:
            scores: dict[str, Tensor] = {}

            def keep(name: str, x: Tensor, delta: Tensor) -> None:
                whole = distiller.factors[name] if name in finer else layers[name]
                scores[name] = question_scores(x, delta, whole.U, s[name], whole.Vh)

            with _taps(layers, keep, checkpointing):
                _losses(distiller.model, batch, generator).sum().backward()
            yield from scores.items()

        yield scored


@contextmanager
def question_gradients(distiller: Distiller, checkpointing: bool = False) -> Iterator[Scored]:
    """The same scores by automatic differentiation, for any projection: one backward pass per question."""
    spectra = {
        name: torch.zeros(factors.s.shape, device=distiller.model.device, requires_grad=True)
        for name, factors in distiller.factors.items()
    }
    s = {name: factors.s.float().to(distiller.model.device) for name, factors in distiller.factors.items()}
    with distiller.gated() as layers, checkpointed(distiller.model, checkpointing):
        layers.set(spectra)

        def scored(batch: TargetBatch, generator: torch.Generator) -> Iterator[tuple[str, Tensor]]:
            losses = _losses(distiller.model, batch, generator)
            rows = batch.predicts.nonzero()[:, 0].to(losses.device)
            for row in range(len(batch.predicts)):
                loss = losses[rows == row].sum()
                for name, slope in zip(
                    spectra, torch.autograd.grad(loss, [*spectra.values()], retain_graph=True), strict=True
                ):
                    yield name, (slope * s[name])[None]

        yield scored


def _losses(model: Any, batch: TargetBatch, generator: torch.Generator) -> Float[Tensor, " N"]:
    """−log p of a token drawn from the model at every answer position."""
    log_p = batch.logits(model).float().log_softmax(-1)
    return -log_p.gather(-1, draw_tokens(log_p.detach(), generator)[:, None])[:, 0]


def question_scores(
    x: Float[Tensor, "batch length in"],
    delta: Float[Tensor, "batch length out"],
    U: Float[Tensor, "out r"],
    s: Float[Tensor, " r"],
    Vh: Float[Tensor, "r in"],
) -> Float[Tensor, "batch r"]:
    """Σ_t (δ_t · u_i)(x_t · v_i) s_i per question."""
    inner = x.float() @ Vh.to(x.device).float().mT
    outer = delta.float() @ U.to(x.device).float()
    return (inner * outer).sum(1) * s


def draw_tokens(log_p: Float[Tensor, "N vocabulary"], generator: torch.Generator) -> Int[Tensor, " N"]:
    """One token per position from the teacher's distribution."""
    return torch.multinomial(log_p.exp().cpu(), 1, generator=generator)[:, 0].to(log_p.device)


@contextmanager
def _taps(
    layers: Mapping[str, nn.Module], keep: Callable[[str, Tensor, Tensor], None], checkpointing: bool
) -> Iterator[None]:
    """Inside the context, `keep` is called with each layer's name, input and gradient at its output, as soon as a
    backward pass has both; hooks are removed on exit. For checkpointed layers the input is that of the recomputation in
    the backward pass, which may come before or after the gradient."""
    inputs, gradients, skipped = dict[str, Tensor](), dict[str, Tensor](), set[str]()

    def meet(name: str) -> None:
        if name in inputs and name in gradients:
            keep(name, inputs.pop(name), gradients.pop(name))

    def enter(name: str, module: nn.Module, args: tuple[Tensor, ...]) -> None:
        if checkpointing and name not in skipped:
            skipped.add(name)
            return
        inputs[name] = args[0].detach()
        meet(name)

    def leave(name: str, module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        def arrive(gradient: Tensor) -> None:
            gradients[name] = gradient.detach()
            meet(name)

        if not output.requires_grad:
            output.requires_grad_()  # nothing below needs a gradient: the graph starts here
        output.register_hook(arrive)

    with ExitStack() as hooks:
        for name, layer in layers.items():
            hooks.callback(layer.register_forward_pre_hook(partial(enter, name)).remove)
            hooks.callback(layer.register_forward_hook(partial(leave, name)).remove)
        yield
