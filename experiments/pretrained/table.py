"""Every rule on one trio: strengths chosen on validation, scores measured on test, nothing rounded.

A row is a method at one strength on one split. Merged weights come from the package (`Rebuilder`, and its gates); their
difference from the VLM's is applied beside the VLM's own bf16 weights, y = W x + ΔW x, with ΔW in bf16: what is added
keeps eight bits of its own and is not rounded away under W. So rows compare rules and not roundings; `written` is the
share of ΔW that a bf16 file would hold (effective λ).

Chosen is the strength with the best mean of sums and perception on the validation split.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from experiments.pretrained import scenes
from experiments.pretrained.learned import LEARNED, SHUFFLED, learned
from experiments.pretrained.models import training_dtype
from experiments.pretrained.stages import Trio
from vlmgraft.analysis.bench import CellLog
from vlmgraft.analysis.in_memory import Rebuilder
from vlmgraft.analysis.visual_attention import visual_attention
from vlmgraft.distillation.targets import Targets
from vlmgraft.distillation.teacher import build_targets
from vlmgraft.evaluation.ask import ask
from vlmgraft.evaluation.engine import Sampling, TransformersEngine
from vlmgraft.evaluation.items import Suite
from vlmgraft.evaluation.readers import load_suite
from vlmgraft.hf.batches import load_questions
from vlmgraft.hf.models import load_processor, load_vlm
from vlmgraft.hf.modules import match_linears
from vlmgraft.recipe.model import load_recipe
from vlmgraft.recipe.resolve import pair
from vlmgraft.spectral.decompose import decompose

BATCH = 150
SUM_TOKENS, LOOK_TOKENS, KL_TOKENS = 48, 20, 24


def _scaled(options: Mapping[str, Any], *scales: float) -> list[dict[str, Any]]:
    return [{**options, "scale": scale} for scale in scales]


def _weighted(name: str, density: float, *weights: float) -> list[dict[str, Any]]:
    """Rules that thin out task vectors: the donor's, and not the VLM's own."""
    return [{"name": name, "weights": [1.0, x], "density": 1.0, "donor_density": density} for x in weights]


RANK_ONE = {"name": "spectral", "rule": "rank_k", "rank": 1}
METHODS: dict[str, list[dict[str, Any]]] = {
    "task arithmetic": _scaled({"name": "task_arithmetic"}, 0.2, 0.25, 0.3, 0.35, 0.4, 0.5, 0.75, 1.0),
    "task arithmetic beyond 1": _scaled({"name": "task_arithmetic"}, 2.0, 3.0, 5.0),
    "truncate 16": _scaled({"name": "spectral", "rule": "truncate", "rank": 16}, 0.3, 0.5, 0.75),
    "rank one": _scaled(RANK_ONE, 0.1, 0.2, 0.3),
    "linear": [{"name": "linear", "vlm_weight": a} for a in (0.9, 0.7, 0.5)],
    "layer swap": [{"name": "layer_swap", "vlm_weight": 0.6, "keep_layers": kept} for kept in ("0-5", "0-11", "0-17")],
    "slerp": [{"name": "slerp", "t": t} for t in (0.1, 0.3, 0.5)],
    "TIES": _weighted("ties", 0.2, 0.5, 1.0, 1.5),
    "DARE": _weighted("dare_linear", 0.2, 0.2, 0.3, 0.4),
    "DARE-TIES": _weighted("dare_ties", 0.2, 0.3, 0.5, 1.0),
    "DELLA": _weighted("della", 0.5, 0.3, 0.5, 1.0),
    "Breadcrumbs": _weighted("breadcrumbs", 0.85, 0.3, 0.4, 0.6),
    "SCE": [{"name": "sce", "density": density} for density in (1.0, 0.1)],
    "Model Stock": [{"name": "model_stock"}],
    "STAR": _scaled({"name": "spectral", "rule": "star"}, 0.1, 0.2, 0.3),
    "truncate 64": _scaled({"name": "spectral", "rule": "truncate", "rank": 64}, 0.3, 0.45, 0.6),
    "SAR": _scaled({"name": "spectral", "rule": "sar"}, 1.0, 4.0, 12.0),
    "rank one + 5 % base": _scaled({**RANK_ONE, "interpolation": 0.05}, 0.05, 0.2),
    "IP-Merging": _scaled({"name": "ip_merging"}, 0.3, 1.0, 2.0),
    "IP-Merging paper": _scaled({"name": "ip_merging", "variant": "paper"}, 0.3, 0.6),
    "FRANK": [{"name": "frank", "prior": prior} for prior in ("max_rescaled", "literal", "none")],
}


def _layer(role: str) -> int:
    return int(role.split(".")[1])


PLACES: dict[str, Callable[[str], bool]] = {
    "layers 0 to 9": lambda role: _layer(role) < 10,
    "layers 10 to 19": lambda role: 10 <= _layer(role) < 20,
    "layers 20 to 29": lambda role: _layer(role) >= 20,
    "attention": lambda role: "self_attn" in role,
}


@contextmanager
def beside(linears: Mapping[str, torch.nn.Linear], changes: Mapping[str, Tensor]) -> Iterator[None]:
    """The model with ΔW x added to the output of these layers."""

    def add(change: Tensor, layer: Any, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        return output + F.linear(inputs[0], change)

    with ExitStack() as stack:
        for role, change in changes.items():
            hook = linears[role].register_forward_hook(partial(add, change.to(linears[role].weight.dtype)))
            stack.callback(hook.remove)
        yield


def written(weight: Tensor, change: Tensor) -> tuple[float, float]:
    """(⟨what a bf16 file would hold of ΔW, ΔW⟩, ‖ΔW‖²): their ratio is the effective λ."""
    kept = (weight.float() + change).bfloat16().float() - weight.float()
    return float((kept * change).sum()), float(change.square().sum())


@dataclass
class Table:
    """The measurements on one VLM of one trio with one donor; everything is kept below the seed's folder."""

    trio: Trio
    vlm: str = "vlm-replay"
    donor: str = "donor"

    @cached_property
    def folder(self) -> Path:
        """Rows, factors and gates."""
        return self.trio.folder / f"table-{self.vlm}-{self.donor}"

    @property
    def sources(self) -> dict[str, Any]:
        """The recipe's checkpoints."""
        base, seed = str(self.trio.base), self.trio.folder
        return {
            "vlm": str(seed / self.vlm),
            "donor": str(seed / self.donor),
            "donor_base": base,
            "vlm_base": base,
            "modules": ["attention", "mlp"],
        }

    @cached_property
    def model(self) -> Any:
        """The VLM in bf16 where the processor has it."""
        return load_vlm(self.trio.folder / self.vlm, training_dtype())

    @cached_property
    def processor(self) -> Any:
        """Of the VLM."""
        return load_processor(self.trio.folder / self.vlm)

    @cached_property
    def alignment(self) -> Any:
        """VLM, donor and bases, aligned by the package."""
        return pair(load_recipe({**self.sources, "method": {"name": "task_arithmetic"}}))

    @cached_property
    def linears(self) -> dict[str, torch.nn.Linear]:
        """Role → layer."""
        return match_linears(self.model, [str(tensor.role) for tensor in self.alignment.merged])

    @cached_property
    def rebuilder(self) -> Rebuilder:
        """The package's merged tensors in memory; open until the process ends."""
        store = decompose(self.alignment, self.folder / "factors-full", "full", resume=True)
        return Rebuilder(self.alignment, dict(store)).__enter__()

    @cached_property
    def divergence(self) -> Targets:
        """The VLM's own answers to held-out pictures."""
        questions = load_questions(self.trio.folder / "data" / "divergence.jsonl")[: self.trio.sizes.exam * 2 // 3]
        side = (self.model, self.processor)
        return build_targets(side, side, questions, max_new_tokens=KL_TOKENS, batch_size=BATCH)

    # --- what is added -------------------------------------------------------------------------------------------

    def changes(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Role → ΔW in float32; raises ValueError where something else than a projection would change."""
        changed = {}
        for role, weight in weights.items():
            if weight.ndim == 2:
                changed[role] = weight.float() - self.linears[role].weight.detach().float()
        return changed

    @cached_property
    def attention(self) -> list[float]:
        """Share of text's attention on visual tokens, per layer, on calibration pictures; FRANK's prior."""
        questions = load_questions(self.trio.folder / "data" / "calibration.jsonl")[:64]
        return list(visual_attention(self.model, self.processor, questions, batch_size=16))

    def merged(self, options: Mapping[str, Any]) -> dict[str, Tensor]:
        """ΔW of a method's options."""
        if options["name"] == "frank" and options["prior"] != "none":
            options = {**options, "visual_attention": self.attention}
        recipe = load_recipe({**self.sources, "method": dict(options)})
        return self.changes(self.rebuilder.weights(recipe.method))

    # --- what is asked -------------------------------------------------------------------------------------------

    def suites(self, split: str) -> dict[str, tuple[Suite, int]]:
        """Part → items and length of answers; of validation a third, of the out-of-distribution sums what there is."""
        data = self.trio.folder / "data"
        if split == "beyond":
            parts = {
                name: load_suite(data / f"{name}.jsonl", limit=max(1, self.trio.sizes.exam // 3))
                for name in ("plus", "minus", "told")
            }
            return {name: (suite, SUM_TOKENS + 16) for name, suite in parts.items()}
        suite = load_suite(data / f"{split}.jsonl")
        count = self.trio.sizes.exam // (1 if split == "test" else 3)
        kinds = {"sums": ("reasoning", SUM_TOKENS), "perception": ("perception", LOOK_TOKENS)}
        return {
            part: (replace(suite, items=tuple(item for item in suite.items if item.kind == kind)[:count]), tokens)
            for part, (kind, tokens) in kinds.items()
        }

    def scores(self, split: str) -> dict[str, Any]:
        """Right or wrong per item, as texts of 0 and 1, with the share of chains, of the model as it is now."""
        figures: dict[str, Any] = {"right": {}, "chain": {}}
        for part, (suite, tokens) in self.suites(split).items():
            engine = TransformersEngine(self.model, self.processor, Sampling(tokens))
            records = ask(engine, suite, batch_size=BATCH)
            figures["right"][part] = "".join("01"[record.score == 1] for record in records)
            if part != "perception":
                figures["chain"][part] = "".join("01"[scenes.has_chain(record.output)] for record in records)
            figures.setdefault("said", {})[part] = [record.output for record in records[:3]]
        return figures

    def measure(self, cell: Mapping[str, Any], change: Callable[[], Mapping[str, Tensor]]) -> dict[str, Any]:
        """The figures of one method at one strength on one split."""
        began = time.monotonic()
        changes = change()
        built = time.monotonic()
        if cell["split"] == "test":
            _ = self.divergence  # the VLM's own, so before it is changed
        with beside(self.linears, changes), torch.no_grad():
            figures = self.scores(cell["split"])
            if cell["split"] == "test":
                kl = self.divergence.prompt_kl(self.model)
                tokens = torch.cat([batch.predicts.sum(1) for batch in self.divergence.batches])
                held = [written(self.linears[role].weight.detach(), part) for role, part in changes.items()]
                norm = sum(square for _, square in held)
                share = sum(kept for kept, _ in held) / norm if norm else 1.0
                figures |= {"kl": float((kl * tokens).sum() / tokens.sum()), "norm": norm**0.5, "written": share}
        figures["seconds"] = {"rebuild": built - began, "measure": time.monotonic() - built}
        return figures

    # --- the table -----------------------------------------------------------------------------------------------

    def run(self, names: Sequence[str], curve: Sequence[float]) -> list[dict[str, Any]]:
        """All rows of these methods: validation, then the chosen strength on test and on sums of other kinds; of task
        arithmetic the λ of `curve`, and shuffled gates at every strength, on test, too."""
        for split in ("validation", "test", "beyond"):
            self.row("VLM", "", split, dict)
        for name in names:
            points: list[tuple[str, Callable[[], Mapping[str, Tensor]]]]
            if name in METHODS:
                points = [(_setting(options), _late(self.merged, options)) for options in METHODS[name]]
            else:
                at, strengths = learned(self, name)
                points = [(f"strength {x}", _late(at, x)) for x in strengths]
            scored = [self.row(name, setting, "validation", change) for setting, change in points]
            best = max(range(len(points)), key=lambda at: score(scored[at]))
            for place, (setting, change) in enumerate(points):
                of_curve = name == "task arithmetic" and float(setting.split()[1]) in curve
                if place == best or name == SHUFFLED or of_curve:
                    self.row(name, setting, "test", change)
            if name in LEARNED or name == "task arithmetic":
                self.row(name, points[best][0], "beyond", points[best][1])
        return self.log.rows

    def where(self, scale: float) -> None:
        """Task arithmetic in a part of the layers, modules or directions only, and everywhere but there; validation."""
        whole = self.merged({"name": "task_arithmetic", "scale": scale})
        for label, belongs in PLACES.items():
            for words, wanted in (("only", True), ("all but", False)):
                part = {role: change for role, change in whole.items() if belongs(role) is wanted}
                self.row(f"{words} {label}", f"λ {scale}", "validation", _late(dict, part))
        factors = self.rebuilder.factors or {}
        for first, last in ((0, 16), (16, 64), (64, 576)):
            spectra = {name: torch.zeros_like(one.s) for name, one in factors.items()}
            for name, one in factors.items():
                spectra[name][first:last] = scale * one.s[first:last]
            changes = self.changes(self.rebuilder.with_spectra(spectra))
            self.row(f"only directions {first + 1} to {last}", f"λ {scale}", "validation", _late(dict, changes))

    def spectra(self) -> list[dict[str, Any]]:
        """Share of ‖τ‖² in the first 1, 16 and 64 directions, by module, and by thirds of the layers."""
        energies: dict[str, list[tuple[float, ...]]] = {}
        for name, one in (self.rebuilder.factors or {}).items():
            squares, role = one.s.double().square(), name.partition("layers.")[2]
            figures = tuple(float(squares[:count].sum()) for count in (1, 16, 64, len(squares)))
            third = int(role.split(".")[0]) // 10
            for key in (role.split(".")[-2], f"layers {10 * third} to {10 * third + 9}"):
                energies.setdefault(key, []).append(figures)
        sums = {key: [sum(column) for column in zip(*rows, strict=True)] for key, rows in sorted(energies.items())}
        return [
            {"part": key, "norm": whole**0.5, "1": one / whole, "16": sixteen / whole, "64": many / whole}
            for key, (one, sixteen, many, whole) in sums.items()
        ]

    @cached_property
    def log(self) -> CellLog:
        """All rows, on disk as they come."""
        return CellLog(self.folder, "rows", ("method", "setting", "split"), {"sources": self.sources}, resume=True)

    def row(self, name: str, setting: str, split: str, change: Callable[[], Mapping[str, Tensor]]) -> dict[str, Any]:
        """One row, measured unless it is there."""
        cell = {"method": name, "setting": setting, "split": split}
        (found,) = self.log.measure([cell], lambda cell: self.measure(cell, change))
        shown = {part: round(100 * marks.count("1") / len(marks), 1) for part, marks in found["right"].items()}
        took = found["seconds"]["rebuild"] + found["seconds"]["measure"]
        self.trio.report(f"{name}, {setting}, {split}: {shown} KL {found.get('kl', math.nan):.4f}, {took:.0f} s")
        return found


def score(row: Mapping[str, Any]) -> float:
    """Mean of the parts' shares of right answers."""
    return sum(marks.count("1") / len(marks) for marks in row["right"].values()) / len(row["right"])


def _late(function: Callable[[Any], Any], argument: Any) -> Callable[[], Any]:
    return lambda: function(argument)


def _setting(options: Mapping[str, Any]) -> str:
    """The options that tell the points of a method apart."""
    shown = {"scale": "λ", "vlm_weight": "a", "t": "t", "keep_layers": "kept", "weights": "weights", "prior": "prior"}
    shown |= {} if "weights" in options else {"density": "density"}
    return ", ".join(f"{shown[key]} {value}" for key, value in options.items() if key in shown)
