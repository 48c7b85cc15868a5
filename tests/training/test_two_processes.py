"""Gates learned by two gloo processes are those of one, with weights replicated and sharded (FSDP2).

The processes add the gradients of their batches in another order than one process does: gates agree to 1e-3 (logits
move by about 0.3), not bit for bit.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from vlmgraft.spectral.gates import load_gates
from vlmgraft.training.distill import Distiller

OPTIONS: dict[str, Any] = {"steps": 6, "inject_weight": 0.1, "batches_per_step": 2}
SCRIPT = """
import json, sys
from pathlib import Path
import torch
sys.path.insert(0, sys.argv[1])
import conftest as shared
from vlmgraft.lab.models import build_processor, build_vlm
from vlmgraft.training.distill import Distiller
from vlmgraft.training.processes import join_group, process
torch.set_num_threads(1)
out, options = Path(sys.argv[2]), json.loads(sys.argv[3])
join_group()
vlm = build_vlm(0).eval()
for name, sharded in (("replicated", False), ("sharded", True)):
    cache = out / "teacher" if sharded else None
    distiller = Distiller(vlm, build_processor(), shared.random_factors(vlm), shared._image_questions(24),
                          shared._image_questions(12, first=1000), max_new_tokens=6, batch_size=12,
                          cache=cache, sharded=sharded)
    gates = distiller.learn(**options)
    drift = distiller.keep_kl(gates)
    held = sum(p.to_local().numel() if hasattr(p, "to_local") else p.numel() for p in vlm.parameters())
    if process()[0] == 0:
        gates.save(out / name)
        (out / f"{name}.json").write_text(json.dumps({"drift": drift, "held": held}))
again = distiller.learn(**{**options, "gradient_checkpointing": True})
if process()[0] == 0:
    again.save(out / "checkpointed")
"""

COMMANDS = """
import sys
from vlmgraft.cli import main
recipe, work = sys.argv[1:]
for line in (["decompose", recipe, "--out", work + "/factors"],
             ["gates", recipe, "--factors", work + "/factors", "--out", work + "/gates"]):
    sys.argv = ["vlmgraft", *line]
    try:
        main()
    except SystemExit as stop:
        if stop.code:
            raise
"""


def launch(arguments: list[str], processes: int = 2) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={processes}", f"--master_port={port}"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*command, *arguments], timeout=570, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[:3000]


@pytest.mark.slow
def test_two_processes_learn_the_gates_of_one(distiller: Distiller, tmp_path: Path) -> None:
    (script := tmp_path / "learn.py").write_text(SCRIPT)
    launch([str(script), str(Path(__file__).parent), str(tmp_path), json.dumps(OPTIONS)])
    alone = distiller.learn(**OPTIONS)
    assert max(float(logits.abs().max()) for logits in alone.logits.values()) > 0.1
    facts = {name: json.loads((tmp_path / f"{name}.json").read_text()) for name in ("replicated", "sharded")}
    for name in ("replicated", "sharded", "checkpointed"):
        together = load_gates(tmp_path / name)
        for key, logits in alone.logits.items():
            assert (together.logits[key] - logits).abs().max() <= 1e-3, (name, key)
        assert together.log[-1]["kl"] == pytest.approx(alone.log[-1]["kl"], rel=1e-3)
    for found in facts.values():
        assert found["drift"] == pytest.approx(distiller.keep_kl(alone), rel=1e-3)
    whole = sum(parameter.numel() for parameter in distiller.model.parameters())
    inside = sum(p.numel() for name, p in distiller.model.named_parameters() if ".language_model.layers." in name)
    factors = sum(one.U.numel() + one.Vh.numel() for one in distiller.factors.values())
    assert facts["replicated"]["held"] == whole
    assert facts["sharded"]["held"] <= whole - inside + 0.51 * (inside + factors), "half of layers and factors each"


@pytest.mark.slow
def test_the_command_under_torchrun(trio: Path, image_calibration: Path, tmp_path: Path) -> None:
    """`decompose` and `gates` by two processes, then `merge` from their folders: nothing is computed again."""
    import vlmgraft as vg

    calibration = {"data": str(image_calibration), "samples": 16, "held_out": 4, "max_new_tokens": 4, "batch_size": 4}
    places = {"vlm": str(trio / "vlm"), "donor": str(trio / "donor"), "donor_base": str(trio / "base")}
    method = {"name": "frism", "steps": 4, "batches_per_step": 2, "learning_rate": 0.2, "inject_weight": 0.1}
    recipe = {**places, "method": {**method, "calibration": calibration}, "layers": "0-1"}
    (tmp_path / "recipe.yaml").write_text(json.dumps(recipe))  # JSON is YAML
    work = tmp_path / "work"
    (script := tmp_path / "run.py").write_text(COMMANDS)
    launch([str(script), str(tmp_path / "recipe.yaml"), str(work)])
    made = {path: path.stat().st_mtime_ns for path in work.rglob("*") if path.is_file()}
    assert not [path for path in made if path.name.endswith(".tmp") or path.name.endswith(".state")]
    vg.merge(recipe, tmp_path / "merged", workdir=work)
    assert {path: path.stat().st_mtime_ns for path in work.rglob("*") if path.is_file()} == made
    vg.merge(recipe, tmp_path / "alone", workdir=tmp_path / "other")
    together, alone = load_gates(work / "gates"), load_gates(tmp_path / "other" / "gates")
    moved = torch.cat(list(alone.logits.values()))
    assert float(moved.abs().max()) > 0.1
    for name, logits in alone.logits.items():
        assert (together.logits[name] - logits).abs().max() <= 1e-3, name
