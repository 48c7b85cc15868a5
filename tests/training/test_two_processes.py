"""Gates learned by two gloo processes are those of one."""

from __future__ import annotations

import socket
import subprocess
import sys
from pathlib import Path

import pytest

from vlmgraft.spectral.gates import load_gates
from vlmgraft.training.distill import Distiller

SCRIPT = """
import os, sys
import torch
sys.path.insert(0, sys.argv[1])
import conftest as shared
from vlmgraft.hf.models import text_linears
from vlmgraft.lab.models import build_processor, build_vlm
from vlmgraft.spectral.factors import factorize
from vlmgraft.training.distill import Distiller
torch.set_num_threads(1)
torch.distributed.init_process_group("gloo")
vlm = build_vlm(0).eval()
distiller = Distiller(vlm, build_processor(), shared.random_factors(vlm), shared._image_questions(24),
                      max_new_tokens=6, batch_size=12)
gates = distiller.learn(steps=6, inject_weight=0.1, batches_per_step=2)
if torch.distributed.get_rank() == 0:
    from pathlib import Path
    gates.save(Path(sys.argv[2]))
torch.distributed.destroy_process_group()
"""


@pytest.mark.slow
def test_two_processes_learn_the_gates_of_one(distiller: Distiller, tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    script = tmp_path / "learn.py"
    script.write_text(SCRIPT)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", str(port)]
    arguments = [str(script), str(Path(__file__).parent), str(tmp_path / "gates")]
    subprocess.run([*command, *arguments], check=True, timeout=300, capture_output=True)
    together, alone = load_gates(tmp_path / "gates"), distiller.learn(steps=6, inject_weight=0.1, batches_per_step=2)
    for name, logits in alone.logits.items():
        assert (together.logits[name] - logits).abs().max() <= 1e-3, name
    assert together.log[-1]["kl"] == pytest.approx(alone.log[-1]["kl"], rel=1e-3)
