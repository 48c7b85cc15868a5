"""Run folders as commands leave them, small and made by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from safetensors.numpy import save_file

from vlmgraft.storage.jsonl import write_json, write_rows


def estimate(mean: float) -> dict[str, float]:
    return {"mean": mean, "low": mean - 0.03, "high": mean + 0.03}


def point(method: str, scale: float, reasoning: float, perception: float, kl: float) -> dict[str, Any]:
    setting = f"λ {scale:g}" if scale else ""
    both = {"reasoning": estimate(reasoning), "perception": estimate(perception)}
    return {"method": method, "setting": setting, "order": scale, "kl": kl, **both}


POINTS = [
    point("VLM", 0, 0.50, 0.99, 0.0),
    point("task arithmetic", 0.5, 0.70, 0.97, 0.01),
    point("task arithmetic", 1, 0.80, 0.90, 0.1),
    point("FRISM <b>", 1, 0.78, 0.985, 0.004),
]


def knockout() -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    for model, level in (("VLM", 0.5), ("merged", 0.8)):
        same = {"reasoning": estimate(level), "perception": estimate(0.98)}
        rows.append({"model": model, "layer": None, "part": "both", "mode": "intact", **same})
        for mode in ("zero", "only") if model == "merged" else ("zero",):
            for layer in range(3):
                change = {"reasoning": -0.1 * layer, "perception": -0.3 + 0.1 * layer}
                if mode == "only":
                    change = {"reasoning": 0.05 * layer, "perception": 0.0}
                cell = {"model": model, "layer": layer, "part": "both", "mode": mode, "against": model, **same}
                rows.append({**cell, **{f"{kind}_change": estimate(value) for kind, value in change.items()}})
    return rows


def ranks() -> list[dict[str, Any]]:
    rows = [{"by": "energy", "of": 2, "band": None, "scale": 0.0, "energy": 1.0, "injected": 0.0, "kl": 0.0}]
    for band, peak in ((None, 1.0), (0, 1.0), (1, 2.0)):
        for scale in (1.0, 2.0):
            row = {"by": "energy", "of": 2, "band": band, "scale": scale, "energy": 0.5, "injected": scale * 0.7}
            rows.append({**row, "kl": 0.1 * scale, "peak": scale == peak})
    return [
        {**row, "reasoning": estimate(0.7 if row.pop("peak", False) else 0.5), "perception": estimate(0.9)}
        for row in rows
    ]


def distances() -> list[dict[str, Any]]:
    keys = {"weight_norm": 10.0, "donor_norm": 1.0, "vlm_norm": 0.8, "unchanged": 0.01}
    return [
        {"layer": layer, "group": group, **keys, "ratio": 0.1, "vlm_ratio": 0.08, "cosine": 0.1 * layer - 0.1}
        for layer in range(3)
        for group in ("attention", "mlp")
    ]


def write_runs(folder: Path) -> Path:
    """Every kind of run below `folder`."""
    for name in ("sweep", "knockout", "ranks", "inspect", "merged", "answers", "work/gates", "work/factors"):
        (folder / name).mkdir(parents=True)
    write_rows(folder / "sweep" / "sweep.jsonl", POINTS)
    write_rows(folder / "knockout" / "knockout.jsonl", knockout())
    write_rows(folder / "ranks" / "ranks.jsonl", ranks())
    write_rows(folder / "inspect" / "distances.jsonl", distances())
    _spectra(folder / "inspect")
    found: dict[str, Any] = {"extent": {"median_ratio": 0.09}, "base": "from base ‖τ‖ is 0.1 of ‖W‖"}
    write_json(folder / "inspect" / "inspection.json", {**found, "bases": [], "differences": []})
    _gates(folder / "work")
    tensor = {"name": "model.layers.0.mlp.up_proj.weight", "verdict": "merged", "reason": "mlp", "added": 0.5}
    kept = {"name": "visual.x", "verdict": "kept", "reason": "outside", "added": 0.0, "task_vector": None}
    receipt = {"method": "frism", "tensors": [{**tensor, "task_vector": 1.0}, kept], "notes": ["a note"]}
    write_json(
        folder / "merged" / "receipt.json",
        {**receipt, "versions": {"torch": "2"}, "seconds": 1.5, "peak_memory": 10**9},
    )
    (folder / "merged" / "recipe.yaml").write_text("vlm: a\nmethod: {name: frism}  # </pre><script>alert(1)</script>\n")
    _answers(folder / "answers")
    return folder


def _spectra(folder: Path) -> None:
    shown = [[index, 1.0 / (1 + index)] for index in range(8)]
    row = {"shape": [8, 9], "norm": 1.2, "effective_rank": 2.5, "stable_rank": 2.0, "shown": shown, "exact": True}
    first = {"1": 0.4, "8": 0.9, "64": 1.0}
    write_rows(
        folder / "spectra.jsonl",
        [
            {"name": f"model.layers.{layer}.mlp.up_proj.weight", "layer": layer, "group": "mlp", **row, "first": first}
            for layer in range(3)
        ],
    )


def _gates(work: Path) -> None:
    names = [
        f"model.layers.{layer}.{kind}.weight" for layer in range(3) for kind in ("self_attn.q_proj", "mlp.up_proj")
    ]
    logits = {name: np.linspace(2, 0, 32, dtype=np.float32) for name in names}
    save_file(logits, work / "gates" / "gates.safetensors")
    settings = {"scale": 1.0, "inject": "donor", "inject_weight": 3.0, "steps": 20, "energy": 0.4}
    write_json(work / "gates" / "gates.json", settings)
    log = [
        {"step": step, "loss": 0.1, "kl": 0.01 / (1 + step), "energy": 0.2 + 0.01 * step} for step in range(0, 20, 5)
    ]
    write_rows(work / "gates" / "training.jsonl", log)
    for name in names:
        s = np.linspace(1, 0.1, 32, dtype=np.float32)
        zero = np.zeros((32, 32), dtype=np.float32)
        save_file({"U": zero, "s": s, "Vh": zero}, work / "factors" / f"{name}.safetensors")
    (work / "factors" / "factors.json").write_text(json.dumps({"matrices": {}}))


def _answers(folder: Path) -> None:
    Image.new("RGB", (128, 16), (200, 30, 40)).save(folder / "0.png")
    asked = {"question": "what <is> it?", "expected": "12", "image": "0.png"}
    said = [{"model": "VLM", "said": "11", "right": False}, {"model": "merged", "said": "12", "right": True}]
    rows = [
        {"task": "sum", "kind": "reasoning", **asked, "answers": said},
        {"task": "colour", "kind": "perception", **asked, "image": "gone.png", "answers": said},
    ]
    write_rows(folder / "answers.jsonl", rows)


def row(method: str, order: float, reasoning: float, perception: float) -> dict[str, Any]:
    axes = {"reasoning": reasoning, "perception": perception}
    spread = {axis: {"mean": mean, "low": mean - 0.03, "high": mean + 0.02} for axis, mean in axes.items()}
    return {"method": method, "setting": f"λ {order:g}", "order": order, **spread}


ROWS = [row("task arithmetic", order, 0.3 + order / 5, 0.98 - order / 10) for order in (1.0, 0.5, 1.5)]
ROWS += [row("VLM", 0, 0.25, 0.99), row("FRISM", 1, 0.7, 0.97)]
