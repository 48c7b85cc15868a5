"""Write the tables of docs/scale.md anew: `python docs/tools/scale_tables.py`.

They stand between `<!-- table: NAME -->` and `<!-- end -->`; those of measurements are made of what
`python benchmarks/scale.py` left in benchmarks/results/scale.json.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path

from vlmgraft.costs.cost import Stage, Work, stages
from vlmgraft.costs.device import A100, H100, Device
from vlmgraft.costs.models import MODELS, Model
from vlmgraft.distillation.memory import Rank, host_memory_of
from vlmgraft.merging.plan import ASSUMED_RATE

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "scale.md"
MEASURED = ROOT / "benchmarks" / "results" / "scale.json"
COUNTED = MEASURED.with_name("sharded.json")
RANKS: tuple[Rank, ...] = ("full", 1024, 128)
FRISM = ("decompose", "teacher", "gates", "fold")
WAYS = (1, 2, 4, 8, 16, 32)
ROOM = 0.9
"""Of a GPU's memory: the rest is CUDA's own, the allocator's slack, and communication."""


def fill(text: str) -> str:
    """The page with every table written anew."""

    def written(match: re.Match[str]) -> str:
        return f"{match[1]}\n{TABLES[match[2]]()}\n<!-- end -->"

    return re.sub(r"(<!-- table: (\w+) -->\n).*?<!-- end -->", written, text, flags=re.DOTALL)


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def models() -> str:
    """Sizes."""
    rows = [
        [
            one.name,
            f"{one.parameters / 1e9:.2f}",
            f"{one.merged / 1e9:.2f}",
            f"{one.active / 1e9:.2f}",
            f"{2 * one.parameters / 1e9:.1f}",
            f"{one.directions('full') / 1e6:.2f}",
            *(f"{6 * one.factors(rank) / 1e9:.0f}" for rank in RANKS),
        ]
        for one in MODELS
    ]
    header = ["model", "parameters, 10⁹", "merged, 10⁹", "of these a token meets, 10⁹", "checkpoint, GB", "gates, 10⁶"]
    return table([*header, "factors, GB: full rank", "rank 1024", "rank 128"], rows)


def by_stage(rank: Rank) -> str:
    """Operations, bytes and memory of every stage, and seconds on eight H100."""
    rows = []
    for model in MODELS:
        for one in stages(model, Work(rank=rank, gpus=8)):
            memory = one.memory / 2**30
            figures = [f"{one.operations / 1e15:.3g}", f"{one.read / 1e9:.0f}", f"{one.written / 1e9:.3g}"]
            rows.append(
                [
                    model.name,
                    one.name,
                    *figures,
                    f"{memory:.1f}" if memory >= 1 else f"{memory:.2f}",
                    _time(one.seconds),
                ]
            )
    header = ["model", "stage", "operations, 10¹⁵", "reads, GB", "writes, GB", "memory, GiB", "8 × H100, predicted"]
    return table(header, rows)


def needs() -> str:
    """The smallest number of GPUs of 80 GB that FRISM fits on, what it takes of each, disk and time."""
    rows = []
    for model in MODELS:
        for rank in RANKS:
            ways, fits = _smallest(model, rank)
            work = Work(rank=rank, gpus=ways)
            found = _stages(model, work, H100)
            disk = 4 * 2 * model.parameters + 6 * model.factors(rank) + found["teacher"].written
            times = [sum(_stages(model, work, device)[name].seconds for name in FRISM) for device in (A100, H100)]
            memory = [f"{found[name].memory / 2**30:.0f}" for name in ("teacher", "gates")]
            cells = [f"{disk / 1e9:.0f}", str(ways) if fits else f"more than {ways}", *memory]
            rows.append([model.name, str(rank), *cells, *map(_time, times)])
    header = ["model", "rank", "disk, GB", "GPUs of 80 GB", "teacher, GiB on each", "gates, GiB on each"]
    return table([*header, "decompose to fold, A100", "H100"], rows)


def offloaded() -> str:
    """One GPU of 80 GB whose layers are in the host's memory: what it takes of both, and time."""
    rows = []
    for model in MODELS[2:4]:
        for rank in (*RANKS, 64):
            work = Work(rank=rank, offload=True)
            found, slower = (_stages(model, work, device) for device in (H100, A100))
            memory = [found[name].memory for name in ("teacher", "gates")]
            host = (host_memory_of(model.shapes, rank=rank), 2 * model.shapes.layers * model.shapes.layer_parameters
                    + 2 * model.factors(rank))  # fmt: skip
            times = [stages[name].seconds for stages in (slower, found) for name in ("teacher", "gates")]
            cells = [f"{size / 2**30:.0f}" for size in (*memory, *host)]
            rows.append([model.name, str(rank), *cells, *map(_time, times)])
    header = ["model", "rank", "teacher, GiB", "gates, GiB", "host memory, GiB", "not rounded"]
    return table([*header, "teacher, A100", "gates", "teacher, H100", "gates"], rows)


MEASURED_RATIOS = {
    "decompose": "decomposition of 11008 × 2048, at the rate of 2048 × 2048",
    "teacher": "forward pass and head, synthetic decoder",
    "gates": "gated ÷ frozen step, decoder layer of 7B, rank 256, 1024 tokens",
    "fold": "factor store of the lab, float32",
}
"""Of each stage, the measurement that its operations or bytes were held against."""


def one_card() -> str:
    """A FRISM merge of 7B at rank 64 on one H100, without and with a KL budget."""
    model = next(model for model in MODELS if model.name == "Qwen2.5-VL-7B")
    ratios = {row["what"]: row["predicted"] / row["measured"] for row in json.loads(MEASURED.read_text("utf-8"))}
    plain, budget = (
        _stages(model, Work(rank=64, checkpointing=False, budget=budget), H100) for budget in (False, True)
    )
    rows = [
        [name, f"{plain[name].seconds:.0f} s", f"{budget[name].seconds:.0f} s", f"{what}: {ratios[what]:.2f}"]
        for name, what in MEASURED_RATIOS.items()
    ]
    sums = [sum(stages[name].seconds for name in FRISM) for stages in (plain, budget)]
    again = 2.0 * (model.merged + model.parameters) / ASSUMED_RATE
    rows.append(["all", *(f"{seconds:.0f} s" for seconds in sums), ""])
    rows.append(["all, the VLM read from the disk once", *(f"{seconds - again:.0f} s" for seconds in sums), ""])
    return table(["stage", "with inject_weight", "with kl_budget", "predicted ÷ measured"], rows)


def measured() -> str:
    """Predictions against what was measured."""
    rows = [
        [one["what"], _quantity(one["predicted"], one["unit"]), _quantity(one["measured"], one["unit"]),
         f"{one['predicted'] / one['measured']:.2f}"]
        for one in json.loads(MEASURED.read_text(encoding="utf-8"))
    ]  # fmt: skip
    return table(["what", "predicted", "measured", "ratio"], rows)


def counted() -> str:
    """What fake tensors counted on one card."""
    keys = ("weights", "factors", "answering", "matching", "gates", "formula")
    rows = [
        [f"{row['model']} on {row['cards']}", str(row["rank"]), *(f"{row[key] / 2**30:.1f}" for key in keys),
         f"{row['host'] / 2**30:.1f}" if "host" in row else ""]
        for row in json.loads(COUNTED.read_text(encoding="utf-8"))
    ]  # fmt: skip
    peaks = ["peak, answering", "peak, a donor of that size answering", "peak, training", "the cost model's, training"]
    return table(["model, cards", "rank", "weights", "factors", *peaks, "in host memory"], rows)


def _stages(model: Model, work: Work, device: Device) -> dict[str, Stage]:
    return {one.name: one for one in stages(model, work, device)}


def _smallest(model: Model, rank: Rank) -> tuple[int, bool]:
    """How many GPUs of 80 GB answers and training take, and whether so many are enough."""
    for ways in WAYS:
        found = _stages(model, Work(rank=rank, gpus=ways), H100)
        if max(found["teacher"].memory, found["gates"].memory) <= ROOM * H100.memory:
            return ways, True
    return WAYS[-1], False


def _time(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


def _quantity(value: float, unit: str) -> str:
    if unit == "operations":
        return f"{value / 1e9:.3f} · 10⁹"
    if unit.startswith("bytes"):
        return f"{value / 1e6:.1f} MB"
    return f"{value:.2f} s" if unit == "seconds" else f"{value:.2f} ×"


TABLES = {
    "models": models,
    "stages": lambda: by_stage("full"),
    "stages128": lambda: by_stage(128),
    "one_card": one_card,
    "needs": needs,
    "offloaded": offloaded,
    "counted": counted,
    "measured": measured,
}


if __name__ == "__main__":
    PAGE.write_text(fill(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
