"""What is merged in memory is what a merge writes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from analysis_tools import LogitExam

from vlmgraft.alignment import align
from vlmgraft.analysis.merged import Rebuilder
from vlmgraft.analysis.sweep import Point, run_sweep
from vlmgraft.checkpoint.index import open_checkpoint
from vlmgraft.checkpoint.reader import Reader
from vlmgraft.errors import AlignmentError
from vlmgraft.merging import merge_tensors
from vlmgraft.methods import METHODS
from vlmgraft.spectral.factors import Factors

CASES: list[tuple[str, dict[str, Any]]] = [
    ("task_arithmetic", {"scale": 0.7}),
    ("linear", {"vlm_weight": 0.8}),
    ("ties", {}),
    ("dare_linear", {"seed": 3}),
    ("layer_swap", {"keep_layers": 1}),
    ("spectral", {"rule": "truncate", "rank": 8}),
    ("spectral", {"rule": "rank_one"}),
    ("spectral", {"rule": "star", "eta": 0.7}),
    ("spectral", {"rule": "iso", "scale": 0.3}),
]


@pytest.mark.parametrize(("name", "options"), CASES)
def test_weights_are_those_of_the_merged_folder(
    name: str, options: dict[str, Any], trio: Path, tmp_path: Path, factors: dict[str, Factors]
) -> None:
    vlm, donor, base = (open_checkpoint(trio / one) for one in ("vlm", "donor", "base"))
    alignment = align(vlm, donor, base, base, modules=["mlp"], layers="1-2")
    method = METHODS[name](**options)
    merge_tensors(alignment, method, tmp_path / "merged", threads=1)
    written = open_checkpoint(tmp_path / "merged")
    with Rebuilder(alignment, factors) as rebuilder, Reader(written) as reader:
        weights = rebuilder.weights(method)
        for tensor in alignment.merged:
            on_disk = reader.tensor(tensor.name)
            mine = weights.get(str(tensor.role))
            if mine is None:
                with Reader(vlm) as own:
                    assert torch.equal(on_disk, own.tensor(tensor.name))
            elif name == "spectral":  # Krylov and the full decomposition differ in rounding
                torch.testing.assert_close(mine.to(on_disk.dtype), on_disk, rtol=2e-2, atol=1e-4)
            else:
                assert torch.equal(mine.to(on_disk.dtype), on_disk)
    assert name in ("layer_swap",) or len(weights) == len(alignment.merged) == 6


def test_scale_zero_leaves_every_tensor_out(trio: Path, factors: dict[str, Factors]) -> None:
    vlm, donor, base = (open_checkpoint(trio / one) for one in ("vlm", "donor", "base"))
    with Rebuilder(align(vlm, donor, base), factors) as rebuilder:
        assert rebuilder.weights(METHODS["task_arithmetic"](scale=0.0)) == {}
        assert rebuilder.weights(METHODS["spectral"](scale=0.0)) == {}


def test_what_a_method_needs_is_asked_for(trio: Path) -> None:
    alignment = align(open_checkpoint(trio / "vlm"), open_checkpoint(trio / "donor"), open_checkpoint(trio / "base"))
    with Rebuilder(alignment) as rebuilder, pytest.raises(AlignmentError, match="vlm_base"):
        rebuilder.weights(METHODS["ties"]())


def test_a_sweep_marks_its_front_and_goes_on(vlm_model: Any, alignment: Any, tmp_path: Path) -> None:
    built: list[float] = []
    with Rebuilder(alignment) as rebuilder:

        def make(scale: float) -> Any:
            built.append(scale)
            return rebuilder.weights(METHODS["task_arithmetic"](scale=scale))

        points = [Point(f"p{s}", "ta", {"method.scale": s}, lambda s=s: make(s)) for s in (0.5, 1.0, 2.0)]
        first = run_sweep(vlm_model, LogitExam(), points[:2], tmp_path, {}, drift=lambda model: 0.5)
        rows = run_sweep(vlm_model, LogitExam(), points, tmp_path, {}, drift=lambda model: 0.5, resume=True)
    assert built == [0.5, 1.0, 2.0]
    assert [row["setting"] for row in rows] == ["", "λ 0.5", "λ 1", "λ 2"] and rows[1]["order"] == 0.5
    assert [{**row, "front": None} for row in rows[:3]] == [{**row, "front": None} for row in first]
    best = max(rows, key=lambda row: (row["reasoning"]["mean"], row["perception"]["mean"]))
    assert best["front"] and any(row["front"] for row in rows)


def test_settings_are_said_in_words() -> None:
    point = Point("p", "m", {"method.rank": {"energy": 0.5}, "method.scale": 0.25, "modules": "mlp"}, dict)
    assert point.cell["setting"] == "rank energy 0.5, λ 0.25, modules mlp" and point.cell["order"] == 0.25
