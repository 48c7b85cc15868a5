"""What docs/scale.md predicts against what is measured here: operations, bytes, memory and seconds.

    python benchmarks/scale.py --out benchmarks/results/scale.json     # minutes
    python docs/tools/scale_tables.py                                  # the page's tables, from that file and the code

Operations are those that torch's FlopCounterMode counts; bytes are those of /proc/self/io and of files; memory is the
peak of private memory above what a process of its own had before; seconds are in benchmarks/results/svd-3B.txt and
gates-*.txt. Models are the lab's, a synthetic decoder, and a synthetic mixture of experts.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import merge as files
import torch
from torch.utils.flop_counter import FlopCounterMode

from vlmgraft.alignment import align
from vlmgraft.checkpoint.index import open_checkpoint
from vlmgraft.costs.cost import decomposition_memory, forward, gate_step
from vlmgraft.costs.models import Model
from vlmgraft.distillation.gate_vector import GateVector
from vlmgraft.distillation.gated_layers import checkpointed, gated
from vlmgraft.distillation.memory import Shapes, memory_of
from vlmgraft.hf.modules import match_projections, text_experts, text_linears, text_model
from vlmgraft.lab import trio_path
from vlmgraft.merging.plan import plan_merge
from vlmgraft.methods import METHODS
from vlmgraft.spectral.factors import Factors

Row = dict[str, Any]


def row(what: str, unit: str, predicted: float, measured: float) -> Row:
    """One comparison; the ratio is predicted ÷ measured."""
    return {"what": what, "unit": unit, "predicted": float(predicted), "measured": float(measured)}


def counted(run: Callable[[], object]) -> int:
    """Operations of one call; products added in place, which torch's counter passes over, are counted too."""
    in_place = {torch.ops.aten.addmm_: lambda _, left, right, *__, **___: 2 * left[0] * left[1] * right[1]}
    with FlopCounterMode(display=False, custom_mapping=in_place) as counter:
        run()
    return counter.get_total_flops()


def synthetic(kind: str, hidden: int = 512, layers: int = 4) -> Any:
    """A VLM of the Qwen2.5-VL kind, or of the Qwen3-VL mixture, with random weights in float32."""
    from transformers import AutoModelForImageTextToText, Qwen2_5_VLConfig, Qwen3VLMoeConfig

    text: dict[str, Any] = {
        "hidden_size": hidden, "intermediate_size": 3 * hidden, "num_hidden_layers": layers, "vocab_size": 1024,
        "num_attention_heads": hidden // 128, "num_key_value_heads": hidden // 256, "max_position_embeddings": 4096,
    }  # fmt: skip
    tower: dict[str, Any] = {"depth": 1, "hidden_size": 64, "intermediate_size": 64, "num_heads": 2}
    if kind == "dense":
        config: Any = Qwen2_5_VLConfig(text_config=text, vision_config={**tower, "out_hidden_size": hidden})
    else:
        text |= {"num_experts": 16, "num_experts_per_tok": 2, "moe_intermediate_size": hidden // 2, "head_dim": 128}
        vision = {**tower, "out_hidden_size": hidden, "deepstack_visual_indexes": [0], "num_position_embeddings": 16}
        config = Qwen3VLMoeConfig(text_config=text, vision_config=vision)
    torch.manual_seed(0)
    return AutoModelForImageTextToText.from_config(config, attn_implementation="sdpa").eval().requires_grad_(False)


def random_factors(model: Any, rank: int | None) -> dict[str, Factors]:
    """Factors of every projection and stack of experts, by role, without a decomposition."""
    made = {}
    for role, one in {**text_linears(model), **text_experts(model)}.items():
        *stack, out, inner = one.weight.shape
        r = min(out, inner, rank or out)
        U, Vh = torch.randn(*stack, out, r), torch.randn(*stack, r, inner)
        made[role] = Factors(role, role, U, torch.ones(*stack, r), Vh, 1.0, 0.0)
    return {role: one for role, one in made.items() if not role.endswith("gate.weight")}


def step(model: Any, factors: dict[str, Factors], backend: Any, checkpointing: bool, tokens: int, answers: int) -> None:
    """A training step's forward and backward pass on two sequences of random embeddings."""
    x = torch.randn(2, tokens // 2, text_model(model).embed_tokens.weight.shape[1])
    with (
        gated(model, match_projections(model, factors), factors, backend) as layers,
        checkpointed(model, checkpointing),
    ):
        vector = GateVector(factors)
        layers.set(vector.spectra(1.0)[0])
        hidden = text_model(model)(inputs_embeds=x, use_cache=False).last_hidden_state
        rows = hidden.flatten(0, 1)[:answers]
        model.get_output_embeddings()(rows).float().log_softmax(-1).square().mean().backward()


def operations() -> list[Row]:
    """Operations of training steps and of a forward pass."""
    rows, tokens, answers = [], 256, 64
    dense = synthetic("dense")
    shapes = Shapes.of(dense.config)
    for rank, backend, checkpointing in ((None, "factored", False), (64, "factored", False), (None, "rebuilt", False),
                                         (None, "factored", True)):  # fmt: skip
        found = counted(
            lambda r=rank, b=backend, c=checkpointing: step(dense, random_factors(dense, r), b, c, tokens, answers)
        )
        options: dict[str, Any] = {"rank": rank or "full", "checkpointing": checkpointing, "backend": backend}
        expected = gate_step(shapes, tokens, tokens // 2, answers, **options)
        how = f"{backend}, rank {rank or 'full'}{', checkpointed' if checkpointing else ''}"
        rows.append(row(f"gate step, synthetic decoder, {how}", "operations", expected, found))
    x = torch.randn(2, tokens // 2, shapes.hidden)
    with torch.no_grad():
        found = counted(lambda: dense.lm_head(text_model(dense)(inputs_embeds=x, use_cache=False).last_hidden_state))
    expected = forward(Model("", shapes, 0, 0), tokens, tokens // 2, tokens)
    rows.append(row("forward pass and head, synthetic decoder", "operations", expected, found))
    mixture = synthetic("mixture")
    found = counted(lambda: step(mixture, random_factors(mixture, None), "auto", False, tokens, answers))
    expected = gate_step(Shapes.of(mixture.config), tokens, tokens // 2, answers)
    rows.append(row("gate step, synthetic mixture of 16 experts, 2 a token", "operations", expected, found))
    return rows


def transferred() -> tuple[int, int]:
    """Bytes that this process has read and written so far, by whatever system call, cached or not."""
    fields = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    return int(fields["rchar"]), int(fields["wchar"])


def child_merge() -> list[Row]:
    """Task arithmetic of 0.5 GB: bytes and memory."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        files.make(folder, 0.5, files.KEYS[:3])
        plan = plan_merge(
            align(*(open_checkpoint(folder / key) for key in files.KEYS[:3])), METHODS["task_arithmetic"]()
        )
        found: dict[str, float] = {}
        before = transferred()
        with files.measured(found):
            files.ours(folder, folder / "out", "task_arithmetic", 2)
        read, written = (after - start for after, start in zip(transferred(), before, strict=True))
    return [
        row("task arithmetic of 0.5 GB, read", "bytes", plan.read, read),
        row("task arithmetic of 0.5 GB, written", "bytes", plan.written, written),
        row("task arithmetic of 0.5 GB, memory", "bytes of memory", plan.memory, found["memory"]),
    ]


def child_svd(out: int, inner: int) -> list[Row]:
    """Memory of one decomposition."""
    from vlmgraft.spectral.svd import decompose_matrix

    decompose_matrix(torch.randn(64, 32))  # libraries' own buffers
    found: dict[str, float] = {}
    with files.measured(found):
        tau = torch.randn(out, inner)
        decompose_matrix(tau)
    return [
        row(f"decomposition of {out} × {inner}", "bytes of memory", decomposition_memory(out, inner), found["memory"])
    ]


def child_gates(checkpointing: bool) -> list[Row]:
    """Memory of a training step over gates beside weights and factors, which are there before."""
    model = synthetic("dense", 1024, 6)
    factors = random_factors(model, None)
    step(model, factors, "factored", checkpointing, 16, 4)
    shapes = Shapes.of(model.config)
    options: dict[str, Any] = {"tokens": 2048, "answer_tokens": 256, "checkpointing": checkpointing, "width": 4}
    expected = memory_of(shapes, **options, backend="factored")
    found: dict[str, float] = {}
    with files.measured(found):
        step(model, factors, "factored", checkpointing, 2048, 256)
    what = f"gate step, synthetic decoder, 2,048 tokens{', checkpointed' if checkpointing else ''}"
    beside = expected.activations + expected.logits + expected.gates
    return [row(what, "bytes of memory", beside, found["memory"])]


def stored() -> list[Row]:
    """Bytes of the lab's factor store."""
    import vlmgraft as vg

    lab = trio_path()
    recipe = {"vlm": str(lab / "vlm"), "donor": str(lab / "donor"), "donor_base": str(lab / "base")}
    recipe |= {"method": {"name": "frism", "inject_weight": 0.1, "calibration": {"data": "none.jsonl"}}}  # type: ignore[dict-item]
    from vlmgraft.hf.models import load_config

    model = Model.of("lab", load_config(lab / "vlm"))
    with tempfile.TemporaryDirectory() as name:
        vg.decompose(recipe, f"{name}/factors")
        size = sum(file.stat().st_size for file in Path(name, "factors").glob("*.safetensors"))
    expected = 4 * (model.factors("full") + model.directions("full"))
    return [row("factor store of the lab, float32", "bytes", expected, size)]


CHILDREN: dict[str, Callable[[], list[Row]]] = {
    "merge": child_merge,
    "square": lambda: child_svd(2048, 2048),
    "tall": lambda: child_svd(8192, 1024),
    "gates": lambda: child_gates(False),
    "checkpointed": lambda: child_gates(True),
}


def seconds() -> list[Row]:
    """Times measured earlier against operations: one rate for all, that of the first shape."""
    from vlmgraft.spectral.svd import matrix_cost

    results = Path(__file__).parent / "results"
    lines = [
        line.split() for line in (results / "svd-3B.txt").read_text().splitlines() if " full " in line and "×" in line
    ]
    times = {(int(line[0]), int(line[2])): float(line[5]) for line in lines}
    base = (2048, 2048)
    rate = matrix_cost(base) / times[base]
    rows = [
        row(
            f"decomposition of {out} × {inner}, at the rate of 2048 × 2048",
            "seconds",
            matrix_cost((out, inner)) / rate,
            time,
        )
        for (out, inner), time in times.items()
        if (out, inner) != base
    ]
    for name in ("gates-3B.txt", "gates-7B.txt"):
        for line in (results / name).read_text().splitlines()[3:]:
            tokens, rank, _, factored, floor = line.split()[:5]
            what = f"gated ÷ frozen step, decoder layer of {name[6:8]}, rank {rank}, {tokens} tokens"
            rows.append(row(what, "times", float(floor), float(factored)))
    return rows


def main() -> None:
    """Measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="JSON file for the rows")
    parser.add_argument("--child", choices=CHILDREN, help="one measurement, as JSON (used by the program itself)")
    arguments = parser.parse_args()
    if arguments.child:
        print(json.dumps(CHILDREN[arguments.child]()))
        return
    rows = [*operations(), *stored()]
    for name in CHILDREN:
        # blocks of 128 KiB and more go back to the system when they are freed, so that the peak is of what is in use
        environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "131072"}
        command = [sys.executable, __file__, "--child", name]
        ran = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
        rows += json.loads(ran.stdout.splitlines()[-1])
    rows += seconds()
    for one in rows:
        figures = f"{one['predicted']:12.4g} {one['measured']:12.4g} {one['predicted'] / one['measured']:6.2f}"
        print(f"{one['what']:75} {figures} {one['unit']}")
    if arguments.out:
        arguments.out.write_text(json.dumps(rows, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
