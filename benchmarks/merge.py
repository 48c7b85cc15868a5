"""Time and weigh merges of synthetic Qwen2-like bfloat16 checkpoints against `cp` and a loop over whole tensors.

    python benchmarks/merge.py --folder /tmp/bench                    # 3 × 1 GB, growth at 1, 2 and 4 GB
    python benchmarks/merge.py --quick                                # megabytes: does it run?
    python benchmarks/merge.py --folder /tmp/bench --out benchmarks/results/merge

Everything runs in one go, each case `--repeats` times in turn, so that what else the machine does hits all alike; the
table gives medians and ratios of medians. Files are in the page cache ("warm") unless they do not fit into it. Every
merge runs in a process of its own, after `import torch`: its seconds are those from headers to published folder, fsync
included, its memory is the peak of RssAnon above what the process had before the merge began. Before its clock starts
each touches and frees as much memory as it will write, up to 2 GiB: a virtual machine may have given free memory back
to its host, and who takes it next waits for it (on one, a `cp` took 0.3 s right after memory was freed and 1.8 s three
seconds on). A merge is compiled where numba is installed, numba's import included; "…, torch" is not. `cp` is a copy of
one checkpoint without fsync, `cp+fsync` with it; "whole tensors" is the usual script. mergekit runs when `--mergekit`
names its command (in an environment of its own, say), import included. At the sizes after the first, `--grow` says what
runs.
`--out NAME` writes NAME.json and NAME.md.
"""

from __future__ import annotations

import argparse
import json
import mmap
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from vlmgraft.alignment import align
from vlmgraft.checkpoint.header import TensorSpec
from vlmgraft.checkpoint.index import open_checkpoint
from vlmgraft.checkpoint.writer import Writer
from vlmgraft.merging import merge, merge_tensors, plan_merge
from vlmgraft.methods import METHODS

KEYS = ("vlm", "donor", "donor_base", "vlm_base")
OPTIONS: dict[str, dict[str, Any]] = {
    "task_arithmetic": {"scale": 0.7},
    "ties": {},
    "linear": {},
    "layer_swap": {"keep_layers": "0-1"},
    "dare_linear": {},
    "dare_ties": {},
}
"""The methods that work element by element."""


def specs(gigabytes: float, vision: bool) -> list[TensorSpec]:
    """Tensors of about so many GB: layers 2048 × 11008 wide (smaller below 0.2 GB), few embeddings, a visual tensor."""
    hidden, inner, kv = (2048, 11008, 256) if gigabytes >= 0.2 else (64, 344, 16)
    shapes = {"q": (hidden, hidden), "k": (kv, hidden), "v": (kv, hidden), "o": (hidden, hidden)}
    one = 2 * (2 * hidden * hidden + 2 * kv * hidden + 3 * hidden * inner)
    found = [("model.embed_tokens.weight", (4 * hidden, hidden))]
    for layer in range(max(1, round((gigabytes * 1e9 - 8 * hidden * hidden) / one))):
        name = f"model.layers.{layer}"
        found += [(f"{name}.self_attn.{key}_proj.weight", shape) for key, shape in shapes.items()]
        found += [(f"{name}.self_attn.{key}_proj.bias", shapes[key][:1]) for key in "qkv"]
        found += [(f"{name}.mlp.{key}_proj.weight", (inner, hidden)) for key in ("gate", "up")]
        found += [(f"{name}.mlp.down_proj.weight", (hidden, inner))]
        found += [(f"{name}.{key}_layernorm.weight", (hidden,)) for key in ("input", "post_attention")]
    found += [("model.norm.weight", (hidden,))]
    found += [("visual.patch_embed.proj.weight", (hidden, 16))] if vision else []
    return [TensorSpec(name, "BF16", shape) for name, shape in found]


def make(folder: Path, gigabytes: float, keys: tuple[str, ...]) -> None:
    """Checkpoints of normal weights; task vectors are a hundredth of them. Random blocks are repeated: it is the bytes
    that take time."""
    generator = torch.Generator().manual_seed(0)
    base = 0.02 * torch.randn(1 << 20, generator=generator)
    for key in keys:
        tensors = specs(gigabytes, key == "vlm")
        own = (base + 2e-4 * torch.randn(1 << 20, generator=generator)).bfloat16()
        with Writer(folder / key, tensors, 2 * 10**9) as writer:
            for tensor in tensors:
                elements = tensor.nbytes // 2
                for start in range(0, elements, len(own)):
                    writer.write_at(tensor.name, start, own[: min(len(own), elements - start)])
            config = {"model_type": "qwen2_vl" if key == "vlm" else "qwen2", "tie_word_embeddings": True}
            layers = sum(tensor.name.endswith("q_proj.weight") for tensor in tensors)
            config |= {"architectures": ["Qwen2ForCausalLM"], "num_hidden_layers": layers}
            (writer.folder / "config.json").write_text(json.dumps(config))


def copy(folder: Path, out: Path) -> None:
    """Copy the VLM's files with the system's `cp`."""
    out.mkdir()
    subprocess.run(["cp", *map(str, sorted((folder / "vlm").iterdir())), str(out)], check=True)


def flush(folder: Path) -> None:
    """fsync of every file, which our merges do before they publish."""
    for file in folder.iterdir():
        handle = os.open(file, os.O_RDONLY)
        os.fsync(handle)
        os.close(handle)


def whole_tensors(folder: Path, out: Path) -> None:
    """The usual script: open all three, loop over whole tensors in float32, save_file at the end."""
    from safetensors import safe_open
    from safetensors.torch import save_file

    out.mkdir()
    for shard in sorted((folder / "vlm").glob("*.safetensors")):
        merged = {}
        with safe_open(shard, "pt") as vlm:
            for name in vlm.keys():  # noqa: SIM118
                weight = vlm.get_tensor(name)
                if "_proj.weight" in name and name.startswith("model."):
                    donor, base = (_find(folder / key, name).float() for key in ("donor", "donor_base"))
                    weight = (weight.float() + 0.7 * (donor - base)).bfloat16()
                merged[name] = weight
        save_file(merged, out / shard.name)


def _find(folder: Path, name: str) -> torch.Tensor:
    from safetensors import safe_open

    for shard in sorted(folder.glob("*.safetensors")):
        with safe_open(shard, "pt") as file:
            if name in file.keys():  # noqa: SIM118
                return file.get_tensor(name)
    raise KeyError(name)


def ours(folder: Path, out: Path, method: str, threads: int, torch_only: bool = False) -> None:
    """Our merge, from opening the headers to the published folder; compiled where numba is, unless `torch_only`."""
    if torch_only:
        merge.WORTH_COMPILING = sys.maxsize
    keys = KEYS if "vlm_base" in METHODS[method].needs else KEYS[:3]
    alignment = align(*(open_checkpoint(folder / key) for key in keys))
    merge_tensors(alignment, METHODS[method](**OPTIONS[method]), out, threads=threads)


def mergekit(folder: Path, out: Path) -> None:
    """mergekit's command on three text models of the same sizes (it refuses the VLM): base + 1·τ₁ + 0.7·τ₂, float32."""
    weights = {"vlm_base": 1.0, "donor": 0.7}
    models = [{"model": str(folder / key), "parameters": {"weight": weight}} for key, weight in weights.items()]
    recipe = {"merge_method": "task_arithmetic", "base_model": str(folder / "donor_base"), "models": models}
    config = out.with_suffix(".json")
    config.write_text(json.dumps({**recipe, "dtype": "float32", "out_dtype": "bfloat16"}))
    command = [os.environ["MERGEKIT"], str(config), str(out), "--lazy-unpickle", "--no-copy-tokenizer"]
    subprocess.run(command, check=True, capture_output=True, text=True)


def private_memory() -> int:
    """Anonymous resident bytes of this process, which mapped and cached files are not part of."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon"):
            return int(line.split()[1]) * 1024
    return 0


@contextmanager
def measured(result: dict[str, float]) -> Iterator[None]:
    """Fill in `seconds` and `memory`, the peak of private memory above its value at the beginning."""
    stop, peak, before = threading.Event(), [0], private_memory()

    def sample() -> None:
        while not stop.wait(0.02):
            peak[0] = max(peak[0], private_memory())

    sampler = threading.Thread(target=sample)
    sampler.start()
    began = time.perf_counter()
    try:
        yield
        result["seconds"] = time.perf_counter() - began
    finally:
        stop.set()
        sampler.join()
    result["memory"] = max(0, max(peak[0], private_memory()) - before)


def run_case(case: str, folder: Path, out: Path, threads: int) -> None:
    """One case in this process, its result as JSON on stdout."""
    cases: dict[str, Callable[[], Any]] = {
        "cp": lambda: copy(folder, out),
        "cp+fsync": lambda: (copy(folder, out), flush(out)),
        "whole tensors": lambda: whole_tensors(folder, out),
        "whole tensors+fsync": lambda: (whole_tensors(folder, out), flush(out)),
        "mergekit": lambda: mergekit(folder, out),
        **{name: lambda name=name: ours(folder, out, name, threads) for name in OPTIONS},
        **{f"{name}, torch": lambda name=name: ours(folder, out, name, threads, True) for name in OPTIONS},
    }
    result: dict[str, float] = {}
    written = sum(file.stat().st_size for file in (folder / "vlm").iterdir())
    with mmap.mmap(-1, min(written, 1 << 31)) as held:
        for page in range(0, len(held), mmap.PAGESIZE):
            held[page] = 1
    with measured(result):
        cases[case]()
    print(json.dumps(result))


def in_own_process(case: str, folder: Path, threads: int) -> dict[str, float]:
    """`run_case` in a fresh interpreter; its output folder is removed."""
    out = folder / "merged"
    shutil.rmtree(out, ignore_errors=True)
    os.sync()  # what others wrote is not to be flushed on our time
    command = [sys.executable, __file__, "--case", case, "--folder", str(folder), "--threads", str(threads)]
    try:
        done = subprocess.run(command, check=True, capture_output=True, text=True)
    except subprocess.CalledProcessError as error:
        raise SystemExit(f"{case}: {error.stderr[-2000:]}") from None
    finally:
        shutil.rmtree(out, ignore_errors=True)
    return json.loads(done.stdout)


def compare(folder: Path, gigabytes: float, cases: list[str], repeats: int, threads: int) -> list[dict[str, Any]]:
    """All cases in turn, `repeats` times, on new checkpoints of this size; medians, and all seconds."""
    folder.mkdir(parents=True)
    try:
        make(folder, gigabytes, KEYS if {"ties", "dare_ties"} & set(cases) else KEYS[:3])
        found: dict[str, list[dict[str, float]]] = {case: [] for case in cases}
        for turn in range(repeats):  # in another order every time: what runs before a case slows it down
            for case in cases[turn % len(cases) :] + cases[: turn % len(cases)]:
                if case != "mergekit" or turn == 0:  # minutes, and not in doubt
                    found[case].append(in_own_process(case, folder, threads))
        alignment = align(*(open_checkpoint(folder / key) for key in KEYS[:3]))
        plan = plan_merge(alignment, METHODS["task_arithmetic"](), threads=threads)
    finally:
        shutil.rmtree(folder)
    rows = []
    for case, runs in found.items():
        seconds = [run["seconds"] for run in runs]
        row = {"case": case, "bytes": plan.written, "seconds": statistics.median(seconds), "all": seconds}
        rows.append({**row, "memory": max(run["memory"] for run in runs)})
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    """Rows of `compare` as Markdown; ratios to `cp` of the same size."""
    copies = {row["bytes"]: row["seconds"] for row in rows if row["case"] == "cp"}
    lines = [
        "| case | one checkpoint, GB | seconds, median (min–max) | ÷ cp | private memory, MB |",
        "|---|---|---|---|---|",
    ]
    for row in rows:
        ratio, spread = row["seconds"] / copies[row["bytes"]], f"{min(row['all']):.2f}–{max(row['all']):.2f}"
        memory = "" if row["case"].startswith("cp") else f"{row['memory'] / 1e6:.0f}"
        lines.append(
            f"| {row['case']} | {row['bytes'] / 1e9:.2f} | {row['seconds']:.2f} ({spread}) | {ratio:.1f} | {memory} |"
        )
    return "\n".join(lines) + "\n" + "".join(f"- {line}\n" for line in ratios(rows))


def ratios(rows: list[dict[str, Any]]) -> list[str]:
    """The other cases at the first size against task arithmetic, by medians and by the fastest runs."""
    ours = next(row for row in rows if row["case"] == "task_arithmetic")
    others = [row for row in rows if row["bytes"] == ours["bytes"] and row is not ours]
    return [
        f"{row['case']} ÷ task_arithmetic: {row['seconds'] / ours['seconds']:.2f} by medians, "
        f"{min(row['all']) / min(ours['all']):.2f} by the fastest runs"
        for row in others
    ]


def machine() -> dict[str, Any]:
    """Where the numbers come from."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    load = [round(one, 1) for one in os.getloadavg()]
    versions = {
        "load average over 1, 5, 15 minutes": load,
        "python": platform.python_version(),
        "torch": torch.__version__,
    }
    return {"cpu": names[0] if names else platform.machine(), "cores": os.cpu_count(), "memory": pages, **versions}


def main() -> None:
    """Parse the command line, run, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, help="where checkpoints are made; default: a temporary folder")
    parser.add_argument("--sizes", type=float, nargs="+", default=[1, 2, 4], help="GB of one checkpoint")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--quick", action="store_true", help="one repeat at 2 MB")
    parser.add_argument("--out", type=Path, help="write OUT.json and OUT.md")
    parser.add_argument("--cases", nargs="+", help="what runs at the first size; cp and task_arithmetic among it")
    parser.add_argument("--grow", nargs="+", default=["task_arithmetic"], help="what runs at the later sizes")
    parser.add_argument("--mergekit", type=Path, help="mergekit-yaml, where it is installed")
    parser.add_argument("--case", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.case:
        run_case(options.case, options.folder, options.folder / "merged", options.threads)
        return
    sizes, repeats = ([0.002], 1) if options.quick else (options.sizes, options.repeats)
    if options.mergekit:
        os.environ["MERGEKIT"] = str(options.mergekit)
    first = ["cp", "cp+fsync", *([*OPTIONS][:2] if options.quick else OPTIONS), "whole tensors", "whole tensors+fsync"]
    first += ["mergekit"] if options.mergekit else []
    first = options.cases or first
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        for number, size in enumerate(sizes):
            cases = ["cp", *options.grow] if number else first
            rows += compare(Path(folder) / f"{size}", size, cases, repeats, options.threads)
            print(table(rows), flush=True)
    if options.out:
        about = {"command": " ".join(["python", *sys.argv]), "threads": options.threads, **machine()}
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.with_suffix(".json").write_text(json.dumps({"about": about, "rows": rows}, indent=1) + "\n")
        said = "".join(f"- {key}: {value}\n" for key, value in about.items())
        options.out.with_suffix(".md").write_text(f"# benchmarks/merge.py\n\n{table(rows)}\n{said}")


if __name__ == "__main__":
    main()
