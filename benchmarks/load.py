"""Many tensors, many files, many images, many runs: does time grow in step, and does memory stay?

    python benchmarks/load.py --out benchmarks/results/load.json     # minutes
    python benchmarks/load.py --quick                                # seconds, small

Every figure comes from a process of its own. Inputs are sparse files but for one matrix of the donor. Memory is the
growth of private resident memory (/proc/self/smaps_rollup) over the imports; "open" is the largest number of file
descriptors seen at any step of progress.

experts: three mixture-of-experts checkpoints, planned and merged; `plain` has one tensor per expert and projection on
both sides, `fused` a VLM with fused experts as Qwen3-VL-MoE keeps them. shards: one tensor per file, merged and
verified where 256 files may be open. images: as calibration questions: read, checked, digested. sweeps, merges: in one
process, one after the other.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import json
import os
import platform
import resource
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

KEYS = ("vlm", "donor", "donor_base")
Shapes = dict[str, tuple[int, ...]]


def shapes_of(layers: int, experts: int, *, vlm: bool, fused: bool = False) -> Shapes:
    """A small mixture of experts with the names of Qwen3-VL-MoE and Qwen3-MoE."""
    body = "model.language_model." if vlm else "model."
    shapes: Shapes = {f"{body}embed_tokens.weight": (100, 64), f"{body}norm.weight": (64,)}
    for layer in (f"{body}layers.{number}." for number in range(layers)):
        shapes |= {f"{layer}self_attn.{letter}_proj.weight": (64, 64) for letter in "qkvo"}
        shapes |= {f"{layer}{kind}_layernorm.weight": (64,) for kind in ("input", "post_attention")}
        shapes[f"{layer}mlp.gate.weight"] = (experts, 64)
        if fused:
            shapes[f"{layer}mlp.experts.gate_up_proj"] = (experts, 64, 64)
            shapes[f"{layer}mlp.experts.down_proj"] = (experts, 32, 64)
            continue
        for expert in range(experts):
            wide = {"gate": (32, 64), "up": (32, 64), "down": (64, 32)}
            shapes |= {f"{layer}mlp.experts.{expert}.{kind}_proj.weight": shape for kind, shape in wide.items()}
    shapes |= {"lm_head.weight": (100, 64)} | ({"model.visual.blocks.0.attn.qkv.weight": (96, 32)} if vlm else {})
    return shapes


def make(folder: Path, shapes: Shapes, shard_size: int, *, vlm: bool, donor: bool = False) -> int:
    """A checkpoint of sparse files, of a donor with some weights that are not zero; gives its number of tensors."""
    from vlmgraft.checkpoint.header import TensorSpec, plan_shards

    folder.mkdir(parents=True)
    shards = plan_shards([TensorSpec(name, "BF16", shape) for name, shape in shapes.items()], shard_size)
    for shard in shards:
        with (folder / shard.name).open("wb") as file:
            file.write(shard.header)
            begin = len(shard.header)
            for tensor in shard.tensors:
                if donor and tensor.name.endswith("layers.0.self_attn.q_proj.weight"):
                    file.seek(begin)
                    file.write(b"\x80\x3f" * 64)  # 64 ones
                begin += tensor.nbytes
            file.truncate(shard.size)
    if len(shards) > 1:
        weight_map = {tensor.name: shard.name for shard in shards for tensor in shard.tensors}
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    config = {"model_type": "qwen3_vl_moe" if vlm else "qwen3_moe", "tie_word_embeddings": False}
    (folder / "config.json").write_text(json.dumps(config))
    return len(shapes)


def make_trio(folder: Path, layers: int, experts: int, *, fused: bool = False, shard_size: int = 10**9) -> int:
    """VLM, donor and base; gives the number of the donor's tensors."""
    for key in KEYS:
        vlm = key == "vlm"
        count = make(
            folder / key,
            shapes_of(layers, experts, vlm=vlm, fused=fused and vlm),
            shard_size,
            vlm=vlm,
            donor=key == "donor",
        )
    return count


def private() -> int:
    """Private resident memory in bytes."""
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return 1024 * sum(int(line.split()[1]) for line in lines if line.startswith(("Private_Clean", "Private_Dirty")))


def descriptors() -> int:
    """How many files are open."""
    return sum(1 for _ in Path("/proc/self/fd").iterdir())


class Watch:
    """A progress function that notes the largest memory, open files and threads."""

    def __init__(self, every: int = 1) -> None:
        gc.collect()
        self.start, self.memory, self.opened, self.threads, self.every, self.calls = private(), 0, 0, 0, every, 0

    def __call__(self, *report: Any) -> None:
        self.calls += 1
        if not report or self.calls % self.every == 0:
            self.memory = max(self.memory, private() - self.start)
            self.opened = max(self.opened, descriptors())
            self.threads = max(self.threads, threading.active_count())


def experts(folder: Path, layers: int, fused: bool) -> dict[str, Any]:
    """Plan and merge."""
    from vlmgraft.alignment import align
    from vlmgraft.checkpoint.index import open_checkpoint
    from vlmgraft.merging import merge_tensors, plan_merge
    from vlmgraft.methods import METHODS

    method, count = METHODS["task_arithmetic"](), make_trio(folder, layers, 128, fused=fused)
    watch, times = Watch(50 if fused else 500), [time.perf_counter()]
    alignment = align(*(open_checkpoint(folder / key) for key in KEYS))
    plan_merge(alignment, method)
    times.append(time.perf_counter())
    receipt = merge_tensors(alignment, method, folder / "out", progress=watch)
    times.append(time.perf_counter())
    watch()
    written = sum(len(row.sources.get("donor", ())) for row in receipt.tensors)
    return {
        "donor tensors": count,
        "tensors written": len(receipt.tensors),
        "donor tensors merged": written,
        "plan s": round(times[1] - times[0], 2),
        "merge s": round(times[2] - times[1], 2),
        "memory MB": round(watch.memory / 1e6, 1),
        "open": watch.opened,
    }


def shards(folder: Path, files: int) -> dict[str, Any]:
    """Merge and verify a checkpoint of so many files where 256 may be open."""
    from vlmgraft.alignment import align
    from vlmgraft.checkpoint.index import open_checkpoint
    from vlmgraft.checkpoint.verify import verify
    from vlmgraft.merging import merge_tensors
    from vlmgraft.methods import METHODS

    make_trio(folder, max(1, files // 31), 8, shard_size=1)
    resource.setrlimit(resource.RLIMIT_NOFILE, (256, 256))
    watch, began = Watch(100), time.perf_counter()
    alignment = align(*(open_checkpoint(folder / key) for key in KEYS))
    merge_tensors(alignment, METHODS["task_arithmetic"](), folder / "out", shard_size=1, progress=watch)
    merged = time.perf_counter()
    found = verify(folder / "out", progress=watch)
    took = {"merge s": round(merged - began, 2), "verify s": round(time.perf_counter() - merged, 2)}
    inputs = len(alignment.vlm.files) + len(alignment.donor.files) * 2
    made = {"input files": inputs, "output files": found.files, "faults": len(found.faults)}
    return {**made, **took, "memory MB": round(watch.memory / 1e6, 1), "open": watch.opened}


def images(folder: Path, count: int) -> dict[str, Any]:
    """Calibration questions: read with their images' checks, digested, their lengths checked."""
    import numpy
    from PIL import Image

    from vlmgraft.data.questions import questions_digest
    from vlmgraft.hf.batches import check_lengths, load_questions
    from vlmgraft.hf.models import load_config, load_processor
    from vlmgraft.lab import trio_path

    rng, rows = numpy.random.default_rng(0), []
    for number in range(count):
        Image.fromarray(rng.integers(0, 255, (16, 16, 3), dtype=numpy.uint8)).save(folder / f"{number}.png")
        rows.append(json.dumps({"question": f"What is {number}?", "image": f"{number}.png"}))
    (folder / "questions.jsonl").write_text("\n".join(rows))
    vlm = trio_path() / "vlm"
    config, processor = load_config(vlm), load_processor(vlm)
    check_lengths(config, processor, load_questions(folder / "questions.jsonl", limit=8), 4)  # what a first call loads
    watch, times = Watch(), [time.perf_counter()]
    questions = load_questions(folder / "questions.jsonl", need_images=True)
    times.append(time.perf_counter())
    watch()
    questions_digest(questions)
    times.append(time.perf_counter())
    check_lengths(config, processor, questions, 4)
    times.append(time.perf_counter())
    watch()
    steps = [round(after - before, 2) for before, after in itertools.pairwise(times)]
    names = ("read and check s", "digest s", "lengths s")
    return {"images": len(questions), **dict(zip(names, steps, strict=True)), "memory MB": round(watch.memory / 1e6, 1)}


def repeated(run: Callable[[int], object], times: int) -> dict[str, Any]:
    """Memory after a tenth, half and all of the runs, over what it was after the first tenth."""
    marks: dict[str, Any] = {"runs": times}
    began = time.perf_counter()
    for number in range(1, times + 1):
        run(number)
        if number in (max(1, times // 10), times // 2, times):
            gc.collect()
            now = {"MB": round(private() / 1e6, 1), "open": descriptors()}
            marks[f"after {number}"] = now | {"threads": threading.active_count()}
    return marks | {"seconds": round(time.perf_counter() - began, 1)}


def sweeps(folder: Path, times: int) -> dict[str, Any]:
    """Sweeps of one point on the lab."""
    import vlmgraft as vg
    from vlmgraft.analysis import EvalData
    from vlmgraft.lab import trio_path

    trio = trio_path()
    places = {"vlm": str(trio / "vlm"), "donor": str(trio / "donor"), "donor_base": str(trio / "base")}
    recipe, data = places | {"method": {"name": "task_arithmetic"}}, EvalData(samples=4)
    return repeated(lambda n: vg.analysis.sweep({"t": recipe}, ["method.scale=0.5"], folder / str(n), data), times)


def merges(folder: Path, times: int) -> dict[str, Any]:
    """Merges of the lab's models by every method in turn that needs no training."""
    import vlmgraft as vg
    from vlmgraft.lab import trio_path

    trio, names = trio_path(), ("task_arithmetic", "linear", "spectral")
    places = {"vlm": str(trio / "vlm"), "donor": str(trio / "donor"), "donor_base": str(trio / "base")}
    return repeated(
        lambda n: vg.merge(places | {"method": {"name": names[n % len(names)]}}, folder / str(n)),
        times,
    )


CHILDREN: dict[str, Callable[..., dict[str, Any]]] = {
    "experts": experts, "shards": shards, "images": images, "sweeps": sweeps, "merges": merges,
}  # fmt: skip
FULL = [
    *[("experts", (layers, False)) for layers in (29, 58, 117)],
    *[("experts", (layers, True)) for layers in (29, 58, 117)],
    *[("shards", (files,)) for files in (250, 500, 1000)],
    *[("images", (count,)) for count in (2500, 5000, 10000)],
    ("sweeps", (100,)),
    ("merges", (100,)),
]
QUICK = [("experts", (1, False)), ("experts", (1, True)), ("shards", (31,)), ("images", (40,)), ("merges", (10,))]


def child(name: str, arguments: tuple[Any, ...]) -> dict[str, Any]:
    """Run one in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, __file__, "--child", json.dumps([name, arguments, folder])]
        ran = subprocess.run(command, capture_output=True, text=True, check=False)
    if ran.returncode:
        raise RuntimeError(f"{name} {arguments}: {ran.stderr}")
    found: dict[str, Any] = json.loads(ran.stdout.splitlines()[-1])
    return found


def main() -> None:
    """Parse the command line, run, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="small")
    parser.add_argument("--only", nargs="*", choices=CHILDREN, help="some of them")
    parser.add_argument("--out", type=Path, help="a JSON file; rows of other kinds in it stay")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        name, arguments, folder = json.loads(options.child)
        print(json.dumps(CHILDREN[name](Path(folder), *arguments)))
        return
    rows: list[dict[str, Any]] = []
    for name, arguments in QUICK if options.quick else FULL:
        if not options.only or name in options.only:
            kind = name + (" fused" if name == "experts" and arguments[1] else "")
            rows.append({"what": kind, **child(name, arguments)})
            print(json.dumps(rows[-1]), flush=True)
    about = {"command": " ".join(["python", *sys.argv]), "python": platform.python_version(), "cores": os.cpu_count()}
    if options.out:
        made = {row["what"] for row in rows}
        before = json.loads(options.out.read_text())["rows"] if options.out.is_file() else []
        kept = [row for row in before if row["what"] not in made]
        options.out.write_text(json.dumps({"about": about, "rows": kept + rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
