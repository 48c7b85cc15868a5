"""Commands in several gloo processes, on a folder whose files show late and after a kill: one process's bits."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import vlmgraft as vg
from vlmgraft.spectral.gate_store import load_gates

sys.path.insert(0, str(Path(__file__).parent))
from gloo import launch, torch_threads

COMMANDS = """
import os, signal, sys, time
from pathlib import Path
from vlmgraft.cli import main
from vlmgraft.distillation import curvature
from vlmgraft.distillation.trainer import GateTrainer
seen, listed = Path.is_file, Path.iterdir
def late(path):  # as on a network file system: a file shows a second after it was written
    try:
        return "work" in path.parts and seen(path) and time.time() - path.stat().st_mtime < 1
    except FileNotFoundError:  # a temporary file that another process has renamed by now
        return True
Path.is_file = lambda path: seen(path) and not late(path)
Path.iterdir = lambda folder: (path for path in listed(folder) if not late(path))
def die():
    if os.environ["RANK"] == "1":
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(60)
if os.environ.get("KILLED") == "training":  # with the first state written, rank 1 is gone; torchrun ends the others
    kept = GateTrainer._keep
    def killed(self, state, step):
        kept(self, state, step)
        while not seen(state):
            time.sleep(0.1)
        die()
    GateTrainer._keep = killed
if os.environ.get("KILLED") == "curvature":  # in the first batch of the estimate
    curvature._losses = lambda *_: die()
main()
"""


@pytest.mark.slow
@pytest.mark.parametrize(("processes", "killed"), [(2, False), (2, True), (4, False), (4, True)])
def test_the_command_under_torchrun(
    processes: int, killed: bool, trio: Path, image_calibration: Path, tmp_path: Path
) -> None:
    """`decompose` and `gates` on a folder whose files show late, also killed and begun again, then `merge` from their
    folders: nothing is computed again, and factors and gates are one process's, bit for bit."""
    calibration = {"data": str(image_calibration), "samples": 16, "held_out": 4, "max_new_tokens": 4, "batch_size": 4}
    places = {"vlm": str(trio / "vlm"), "donor": str(trio / "donor"), "donor_base": str(trio / "base")}
    method = {"name": "frism", "steps": 13, "batches_per_step": 3, "learning_rate": 0.2, "inject": "donor"}
    told = [{"question": f"sum {number}"} for number in (3, 5, 7)]
    (tmp_path / "told.jsonl").write_text("\n".join(map(json.dumps, told)))
    method |= {"questions": str(tmp_path / "told.jsonl"), "donor_tokens": 4, "kl_budget": 0.01, "start": "curvature"}
    recipe = {**places, "method": {**method, "calibration": calibration}, "layers": "0-1"}
    (tmp_path / "recipe.yaml").write_text(json.dumps(recipe))  # JSON is YAML
    work = tmp_path / "work"
    (script := tmp_path / "run.py").write_text(COMMANDS)
    command = [str(script), "decompose", str(tmp_path / "recipe.yaml"), "--out", str(work / "factors")]
    launch(command, processes)
    command[1:2], command[-1:] = ["gates"], [str(work / "gates"), "--factors", str(work / "factors")]
    command += ["--set", f"method.offload={'true' if processes == 4 else 'auto'}"]
    if killed:
        launch(command, processes, killed="training")
        assert (work / "gates.state").is_file() and not (work / "gates").exists()
    launch(command, processes)
    made = {path: path.stat().st_mtime_ns for path in work.rglob("*") if path.is_file()}
    assert not [path for path in made if path.name.endswith(".tmp") or path.name.endswith(".state")]
    vg.merge(recipe, tmp_path / "merged", workdir=work)
    assert {path: path.stat().st_mtime_ns for path in work.rglob("*") if path.is_file()} == made
    with torch_threads(1):
        vg.merge(recipe, tmp_path / "alone", workdir=tmp_path / "other")
    together, alone = load_gates(work / "gates"), load_gates(tmp_path / "other" / "gates")
    moved = torch.cat(list(alone.logits.values()))
    assert float(moved.std()) > 0.1
    for name, logits in alone.logits.items():
        assert torch.equal(together.logits[name], logits), name
    for path in (tmp_path / "other" / "factors").glob("*.safetensors"):
        factors = load_file(work / "factors" / path.name)
        assert all(torch.equal(factors[key], value) for key, value in load_file(path).items()), path.name


@pytest.mark.slow
@pytest.mark.parametrize(("processes", "killed"), [(2, False), (2, True), (4, False), (4, True)])
def test_curvature_under_torchrun(
    processes: int, killed: bool, trio: Path, image_calibration: Path, tmp_path: Path
) -> None:
    """`gates` of the method curvature on a folder whose files show late, also killed in the estimate and begun again:
    the teacher's part is kept, and the gates are one process's, bit for bit."""
    calibration = {"data": str(image_calibration), "samples": 16, "held_out": 4, "max_new_tokens": 4, "batch_size": 4}
    places = {"vlm": str(trio / "vlm"), "donor": str(trio / "donor"), "donor_base": str(trio / "base")}
    method = {"name": "curvature", "draws": 2, "kl_budget": 0.01, "calibration": calibration}
    recipe, work = {**places, "method": method, "layers": "0-1"}, tmp_path / "work"
    (tmp_path / "recipe.yaml").write_text(json.dumps(recipe))
    with torch_threads(1):
        vg.merge(recipe, tmp_path / "alone", workdir=tmp_path / "other")
    (script := tmp_path / "run.py").write_text(COMMANDS)
    command = [str(script), "gates", str(tmp_path / "recipe.yaml"), "--out", str(work / "gates")]
    command += ["--factors", str(tmp_path / "other" / "factors")]
    kept: dict[Path, int] = {}
    if killed:
        launch(command, processes, killed="curvature")
        kept = {path: path.stat().st_mtime_ns for path in (work / "gates.teacher").rglob("*.safetensors")}
        assert kept and not (work / "gates").exists()
    launch(command, processes)
    assert all(path.stat().st_mtime_ns == time for path, time in kept.items())
    together, alone = load_gates(work / "gates"), load_gates(tmp_path / "other" / "gates")
    opened = torch.cat([logits > 0 for logits in alone.logits.values()])
    assert 0 < int(opened.sum()) < len(opened)
    assert all(torch.equal(together.logits[name], logits) for name, logits in alone.logits.items())
