"""One small run of every command that writes, on the embedded trio, and what it leaves."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from injected import Writes, counted
from safetensors import safe_open

from vlmgraft.lab.exam import draw_exam, save_traces
from vlmgraft.storage.jsonl import write_rows

TIMES = ("receipt.json", "trainer_state.json", "training_args.bin", "rng_state.pth", "optimizer.pt")
"""Files that hold seconds, or paths of the run."""


EVERYWHERE = os.environ.get("VLMGRAFT_FAULTS") == "all"
"""Faults at every write instead of at some: hours."""
LAST = {
    "decompose": "factors.json", "sweep": "sweep.recipes.json", "front": "front.jsonl", "choose": "choose.svg",
}  # fmt: skip
"""Folders that are filled under their own name: the file that is written last."""
LOGS = ("knockout", "ranks")
"""Folders that are logs: whole after every row."""


@dataclass(frozen=True)
class Job:
    """A command line that writes `out`; again: what is added to go on after a failure."""

    arguments: tuple[str, ...]
    out: Path
    again: tuple[str, ...] = ("--resume",)

    def resumed(self) -> tuple[str, ...]:
        """The command line that goes on."""
        return (*self.arguments, *self.again)


def make_jobs(trio: Path, calibration: Path, inputs: Path) -> dict[str, Callable[[Path], Job]]:
    """Command lines by name, as functions of the folder to write in; `inputs` takes recipes and questions."""
    places = {"vlm": str(trio / "vlm"), "donor": str(trio / "donor"), "donor_base": str(trio / "base")}
    asked = {"data": str(calibration), "samples": 8, "held_out": 4, "max_new_tokens": 4, "batch_size": 4}
    frism = {"name": "frism", "steps": 10, "learning_rate": 0.2, "inject_weight": 0.1, "calibration": asked}
    curvature = {"name": "curvature", "kl_budget": 0.02, "calibration": asked}
    bound = {"kind": "expectation", "prompts": 8, "cap": 0.05}
    guarantee = {key: value for key, value in frism.items() if key != "inject_weight"}
    guarantee |= {"kl_budget": 0.02, "budget_guarantee": bound}
    recipes = {
        "merge": places | {"method": {"name": "task_arithmetic"}, "output": {"shard_size": "400KB"}},
        "ties": places | {"vlm_base": places["donor_base"], "method": {"name": "ties"}},
        "frism": places | {"method": frism, "layers": "0"},
        "curvature": places | {"method": curvature, "layers": "0"},
        "guarantee": places | {"method": guarantee, "layers": "0"},
        "tune": places | {"data": {"train": str(_traces(inputs))}, "train": TRAIN},
    }
    for name, recipe in recipes.items():
        (inputs / f"{name}.yaml").write_text(yaml.safe_dump(recipe))
    recipe = {name: str(inputs / f"{name}.yaml") for name in recipes}
    questions, texts = str(_questions(inputs, calibration)), str(inputs / "texts.jsonl")
    write_rows(inputs / "texts.jsonl", [{"question": f"What is {number} + 3?"} for number in range(4)])

    def job(*words: str, out: str = "out", again: tuple[str, ...] = ("--resume",)) -> Callable[[Path], Job]:
        return lambda folder: Job((*words, "--out", str(folder / out), "--quiet"), folder / out, again)

    sweep = ("sweep", recipe["merge"], "--grid", "method.scale=0.5,1", "--data", "lab", "--samples", "4")
    factors, gates = str(inputs / "factors"), str(inputs / "gates")
    return {
        "merge": job("merge", recipe["merge"]),
        "ties": job("merge", recipe["ties"]),
        "frism": job("merge", recipe["frism"]),
        "curvature": job("merge", recipe["curvature"]),
        "guarantee": job("merge", recipe["guarantee"]),
        "knockout": job(
            "knockout", places["vlm"], "--alone", "--data", "lab", "--samples", "4", "--layers", "0", "--part", "mlp"
        ),
        "ranks": job("ranks", recipe["frism"], "--data", "lab", "--samples", "4", "--bands", "2", "--scale", "1"),
        "choose": job(
            "choose",
            recipe["merge"],
            "--data",
            "lab",
            "--samples",
            "4",
            "--rule",
            "task_arithmetic",
            "--rounds",
            "1",
            "--budget",
            "0.05",
        ),
        "steer": job(
            "steer",
            recipe["merge"],
            "--questions",
            texts,
            "--max-new-tokens",
            "2",
            "--batch-size",
            "1",
            out="out.safetensors",
            again=(),
        ),
        "decompose": job("decompose", recipe["frism"]),
        "front": job("front", recipe["frism"], "--factors", factors, "--budgets", "0.01,0.05", again=()),
        "gates": job("gates", recipe["frism"], "--factors", factors, again=()),
        "evaluate": job("evaluate", str(trio / "vlm"), "--data", questions, "--batch-size", "2"),
        "sweep": job(*sweep),
        "tune": lambda folder: Job(("tune", recipe["tune"], "--out", str(folder / "out")), folder / "out"),
        "export": lambda folder: Job(
            (
                "export",
                gates,
                "--to",
                "lora",
                "--factors",
                factors,
                "--vlm",
                places["vlm"],
                "--out",
                str(folder / "out"),
            ),
            folder / "out",
            (),
        ),
        "report": lambda folder: Job(("report", gates, "--out", str(folder / "out.html")), folder / "out.html", ()),
    }


TRAIN = {
    "max_steps": 2,
    "learning_rate": 1e-3,
    "per_device_train_batch_size": 2,
    "use_cpu": True,
    "save_steps": 1,
    "disable_tqdm": True,
}


def _traces(inputs: Path) -> Path:
    return save_traces(draw_exam(0, "train", {"sum": 4}), inputs / "traces.jsonl")


def _questions(inputs: Path, calibration: Path) -> Path:
    rows = [json.loads(line) for line in calibration.read_text().splitlines()][:6]
    rows = [row | {"image": str(calibration.parent / row["image"]), "answer": "red"} for row in rows]
    write_rows(inputs / "asked.jsonl", rows)
    return inputs / "asked.jsonl"


def content(out: Path) -> dict[str, Any]:
    """Every file of a folder: tensors by their bytes, other files by theirs, without what holds seconds."""
    found: dict[str, Any] = {}
    for path in [out] if out.is_file() else sorted(out.rglob("*")):
        name = str(path.relative_to(out))
        if path.suffix == ".safetensors":
            with safe_open(path, framework="pt") as file:
                tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
            found[name] = {key: one.reshape(-1).view(torch.uint8).numpy().tobytes() for key, one in tensors.items()}
        elif path.suffix == ".jsonl":
            found[name] = [_timeless(json.loads(line)) for line in path.read_text().splitlines()]
        elif path.is_file() and path.name not in TIMES and path.suffix != ".html":
            found[name] = path.read_bytes()
    return found


def _timeless(row: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in row.items() if not key.endswith(("seconds", "_per_second", "runtime"))}


def unfinished(name: str, out: Path) -> bool:
    """Whether nothing stands under the final name that could be taken for a result."""
    return not out.exists() or name in LOGS or (name in LAST and not (out / LAST[name]).exists())


class Whole:
    """What every command leaves if nothing disturbs it, and its writes; made when it is first asked for."""

    def __init__(self, jobs: dict[str, Callable[[Path], Job]], folder: Path) -> None:
        self.jobs, self.folder = jobs, folder
        self.known: dict[str, tuple[dict[str, Any], list[tuple[str, Path]]]] = {}

    def __call__(self, name: str, run: Callable[..., Any]) -> tuple[dict[str, Any], list[tuple[str, Path]]]:
        if name not in self.known:
            place = self.folder / name
            place.mkdir()
            job = self.jobs[name](place)
            with counted(Writes(place)) as writes:
                ran = run(*job.arguments)
            assert ran.code == 0, ran.err
            self.known[name] = (content(job.out), writes.seen)
        return self.known[name]


def inputs_digest(*folders: Path) -> dict[str, tuple[int, bytes]]:
    """Size and bytes of every file of the inputs."""
    return {str(p): (p.stat().st_size, p.read_bytes()) for f in folders for p in sorted(f.rglob("*")) if p.is_file()}
