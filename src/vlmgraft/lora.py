"""The injected update as a LoRA adapter in PEFT's format, for PEFT and for servers that load adapters.

λ U diag(σ(g) ⊙ s) Vh is already a singular value decomposition, so its best rank-r part is the r largest entries of the
spectrum: lora_B = U_r √c, lora_A = √c Vh_r, lora_alpha = r. What the rank drops is reported per matrix.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import AutoConfig, AutoModelForImageTextToText

from vlmgraft.checkpoint.saving import save_tensors
from vlmgraft.errors import CheckpointError, OutputError, RecipeError
from vlmgraft.hf.models import match_linears
from vlmgraft.publishing import new_folder
from vlmgraft.records import write_json
from vlmgraft.spectral.factors import Factors
from vlmgraft.spectral.gates import Gates


@dataclass(frozen=True)
class LoraReport:
    """What the adapter holds: its rank, and ‖dropped‖_F / ‖update‖_F per matrix and of the whole."""

    rank: int
    errors: Mapping[str, float]
    error: float


def lora_factors(
    factors: Factors, spectrum: Float[Tensor, " r"], rank: int
) -> tuple[Float[Tensor, "rank in"], Float[Tensor, "out rank"], float, float]:
    """lora_A, lora_B (float32, zero rows where the update has fewer directions), and the squared norms of what is
    dropped and of the whole update. lora_B @ lora_A is the best approximation of the update at this rank."""
    order = spectrum.abs().sort(descending=True, stable=True).indices
    kept = order[:rank]
    root = spectrum[kept].abs().sqrt()
    A = torch.zeros(rank, factors.Vh.shape[1])
    B = torch.zeros(factors.U.shape[0], rank)
    A[: len(kept)] = root[:, None] * factors.Vh.float()[kept]
    B[:, : len(kept)] = factors.U.float()[:, kept] * (root * spectrum[kept].sign())
    squared = spectrum.double().square()
    return A, B, float(squared[order[rank:]].sum()), float(squared.sum())


def export_lora(
    vlm: str | Path,
    factors: Mapping[str, Factors],
    gates: Gates,
    out: str | Path,
    rank: int,
    dtype: torch.dtype = torch.bfloat16,
) -> LoraReport:
    """Write adapter_model.safetensors, adapter_config.json and report.json to the new folder `out`.

    vlm: the folder or hub id that the adapter applies to; only its config is read, to learn the module names.
    Raises RecipeError on a rank below 1, OutputError when `out` exists, CheckpointError when the config cannot be read.
    """
    out = Path(out)
    if rank < 1:
        raise RecipeError(f"rank: {rank} must be at least 1")
    if out.exists():
        raise OutputError(f"{out}: exists already; choose a new folder")
    modules = module_names(vlm, list(gates.logits))
    tensors: dict[str, Tensor] = {}
    errors: dict[str, float] = {}
    dropped_sum = whole_sum = 0.0
    for name, module in modules.items():
        A, B, dropped, whole = lora_factors(factors[name], gates.spectrum(name, factors[name].s.cpu()), rank)
        tensors[f"base_model.model.{module}.lora_A.weight"] = A.to(dtype)
        tensors[f"base_model.model.{module}.lora_B.weight"] = B.to(dtype)
        errors[name] = (dropped / whole) ** 0.5 if whole > 0 else 0.0
        dropped_sum, whole_sum = dropped_sum + dropped, whole_sum + whole
    report = LoraReport(rank, errors, (dropped_sum / whole_sum) ** 0.5 if whole_sum > 0 else 0.0)
    with new_folder(out) as folder:
        save_tensors(tensors, folder / "adapter_model.safetensors", {"format": "pt"})
        write_json(folder / "adapter_config.json", _config(str(vlm), list(modules.values()), rank))
        write_json(folder / "report.json", {"rank": rank, "error": report.error, "errors": errors})
    return report


def module_names(vlm: str | Path, names: list[str]) -> dict[str, str]:
    """Tensor name on disk → module name inside the transformers model, from the config alone (no weights)."""
    try:
        config = AutoConfig.from_pretrained(str(vlm))
    except (OSError, ValueError, json.JSONDecodeError) as error:
        raise CheckpointError(f"{vlm}: its config.json cannot be read ({error})") from error
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(config)
    places = {id(module): name for name, module in model.named_modules()}
    return {name: places[id(linear)] for name, linear in match_linears(model, names).items()}


def _config(base: str, modules: list[str], rank: int) -> dict[str, Any]:
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": rank,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "target_modules": modules,
    }
