"""The injected update as a LoRA adapter in PEFT's format, for PEFT and for servers that load adapters.

λ U diag(σ(g) ⊙ s) Vh is already a singular value decomposition, so its best rank-r part is the r largest entries of the
spectrum: lora_B = U_r √c, lora_A = √c Vh_r, lora_alpha = r. What the rank drops is reported per matrix. Of fused
experts every one has an update of this rank, as PEFT's `target_parameters` keep it; servers may not read these.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import AutoModelForImageTextToText

from vlmgraft.checkpoint.receipts import write_receipt
from vlmgraft.checkpoint.saving import save_tensors
from vlmgraft.errors import OutputError, RecipeError
from vlmgraft.hf.models import ExpertStack, load_config, match_projections
from vlmgraft.lora_stacks import stack_keys, stack_tensors
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
    factors: Factors, spectrum: Float[Tensor, "*experts r"], rank: int
) -> tuple[Float[Tensor, "*experts rank in"], Float[Tensor, "*experts out rank"], float, float]:
    """lora_A, lora_B (float32, zero rows where the update has fewer directions), and the squared norms of what is
    dropped and of the whole update. lora_B @ lora_A is the best approximation of the update at this rank."""
    order = spectrum.abs().sort(dim=-1, descending=True, stable=True).indices
    kept = order[..., :rank]
    values = spectrum.take_along_dim(kept, -1)
    root, count, experts = values.abs().sqrt(), kept.shape[-1], spectrum.shape[:-1]
    A = torch.zeros(*experts, rank, factors.Vh.shape[-1])
    B = torch.zeros(*experts, factors.U.shape[-2], rank)
    A[..., :count, :] = root[..., :, None] * factors.Vh.float().take_along_dim(kept[..., :, None], -2)
    B[..., :count] = factors.U.float().take_along_dim(kept[..., None, :], -1) * (root * values.sign())[..., None, :]
    squared = spectrum.double().square()
    return A, B, float(squared.take_along_dim(order[..., rank:], -1).sum()), float(squared.sum())


def export_lora(
    vlm: str | Path,
    factors: Mapping[str, Factors],
    gates: Gates,
    out: str | Path,
    rank: int,
    dtype: torch.dtype = torch.bfloat16,
) -> LoraReport:
    """Write adapter_model.safetensors, adapter_config.json, report.json and receipt.json to the new folder `out`.

    vlm: the folder or hub id that the adapter applies to; only its config is read, to learn the module names.
    Raises RecipeError on a rank below 1, OutputError when `out` exists, CheckpointError when the config cannot be read
    or the gates belong to other factors.
    """
    out = Path(out)
    if rank < 1:
        raise RecipeError(f"rank: {rank} must be at least 1")
    if out.exists():
        raise OutputError(f"{out}: exists already; choose a new folder")
    gates.check(factors)
    places = adapter_places(vlm, factors, list(gates.logits), rank)
    tensors: dict[str, Tensor] = {}
    errors: dict[str, float] = {}
    dropped_sum = whole_sum = 0.0
    for name, place in places.items():
        A, B, dropped, whole = lora_factors(factors[name], gates.spectrum(name, factors[name].s.cpu()), rank)
        if A.ndim == 3:
            A, B = stack_tensors(A, B, place.inputs_first)
        tensors[f"{place.prefix}.lora_A.weight"] = A.to(dtype)
        tensors[f"{place.prefix}.lora_B.weight"] = B.to(dtype)
        errors[name] = (dropped / whole) ** 0.5 if whole > 0 else 0.0
        dropped_sum, whole_sum = dropped_sum + dropped, whole_sum + whole
    report = LoraReport(rank, errors, (dropped_sum / whole_sum) ** 0.5 if whole_sum > 0 else 0.0)
    with new_folder(out) as folder:
        save_tensors(tensors, folder / "adapter_model.safetensors", {"format": "pt"})
        write_json(folder / "adapter_config.json", _config(str(vlm), list(places.values()), rank))
        write_json(folder / "report.json", {"rank": rank, "error": report.error, "errors": errors})
        write_receipt(folder, {"rank": rank, "error": report.error, "vlm": str(vlm)})
    return report


@dataclass(frozen=True)
class AdapterPlace:
    """Where a matrix's adapter goes: its module (of a stack, its parameter) in the transformers model, the prefix of
    its tensors in PEFT's file, and of a stack whether PEFT's in and out are ours exchanged."""

    path: str
    prefix: str
    stacked: bool = False
    inputs_first: bool = False


def adapter_places(
    vlm: str | Path, factors: Mapping[str, Factors], names: Sequence[str], rank: int
) -> dict[str, AdapterPlace]:
    """Tensor name on disk → its place, from the VLM's config alone (no weights)."""
    config = load_config(vlm)
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(config)
    paths = {id(module): name for name, module in model.named_modules()}
    linears: dict[str, str] = {}
    stacks: dict[str, tuple[str, ExpertStack]] = {}
    for name, layer in match_projections(model, names).items():
        if isinstance(layer, ExpertStack):
            stacks[name] = (f"{paths[id(layer.module)]}.{layer.key}", layer)
        else:
            linears[name] = paths[id(layer)]
    places = {name: AdapterPlace(path, f"base_model.model.{path}") for name, path in linears.items()}
    if stacks:
        # asked before PEFT wraps the model: a module whose files hold any stack transposed has all of them so
        turned = {id(s.module) for n, (_, s) in stacks.items() if tuple(s.weight.shape) != factors[n].shape}
        flipped = {
            n: (id(s.module) in turned) != getattr(s.module, "is_transposed", False) for n, (_, s) in stacks.items()
        }
        prefixes = stack_keys(model, list(linears.values()), [path for path, _ in stacks.values()], rank)
        for name, (path, _) in stacks.items():
            places[name] = AdapterPlace(path, prefixes[path], True, flipped[name])
    return places


def _config(base: str, places: Sequence[AdapterPlace], rank: int) -> dict[str, Any]:
    stacks = [place.path for place in places if place.stacked]
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
        "target_modules": [place.path for place in places if not place.stacked],
        **({"target_parameters": stacks} if stacks else {}),
    }
