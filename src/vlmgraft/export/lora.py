"""The injected update as a LoRA adapter in PEFT's format, for PEFT and for servers that load adapters.

λ U diag(σ(g) ⊙ s) Vh is already a singular value decomposition, so its best rank-r part is the r largest entries of the
spectrum: lora_B = U_r √c, lora_A = √c Vh_r, lora_alpha = r. The error of this truncation is reported per matrix.

For fused experts, a parameter [experts, out, in], every expert has an update of this rank, in the layout of PEFT's
`target_parameters`; servers may not support it. lora_A is [experts · rank, in] with the expert first, lora_B [out, rank
· experts] with the expert last. PEFT itself determines the names of these tensors.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from vlmgraft.checkpoint.digests import write_receipt
from vlmgraft.checkpoint.writer import save_tensors
from vlmgraft.errors import OutputError, RecipeError
from vlmgraft.hf.models import empty_vlm
from vlmgraft.hf.modules import ExpertSlice, ExpertStack, match_projections
from vlmgraft.spectral.factor_store import check_gates
from vlmgraft.spectral.factors import Factors
from vlmgraft.spectral.gates import Gates
from vlmgraft.storage.jsonl import write_json
from vlmgraft.storage.portable import portable
from vlmgraft.storage.publish import new_folder

LOG = logging.getLogger("vlmgraft")


@dataclass(frozen=True)
class LoraReport:
    """What the adapter holds: its rank, and ‖dropped‖_F / ‖update‖_F per matrix and of the whole."""

    rank: int
    errors: Mapping[str, float]
    error: float


def lora_factors(
    factors: Factors, spectrum: Float[Tensor, "*experts r"], rank: int
) -> tuple[Float[Tensor, "*experts rank in"], Float[Tensor, "*experts out rank"], float, float]:
    """lora_A, lora_B (float32, zero rows if the update has fewer directions), and the squared norms of the dropped part
    and of the whole update. lora_B @ lora_A is the best approximation of the update at this rank."""
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


def write_lora(
    vlm: str | Path,
    factors: Mapping[str, Factors],
    gates: Gates,
    out: str | Path,
    rank: int,
    dtype: torch.dtype = torch.bfloat16,
) -> LoraReport:
    """Write adapter_model.safetensors, adapter_config.json, report.json and receipt.json to the new folder `out`.

    vlm: the folder or hub id that the adapter applies to; only its config is read, to learn the module names. rank: at
    most; more than the factors have in any matrix would be zeros, which are not written.
    Raises RecipeError on a rank below 1, OutputError when `out` exists, CheckpointError when the config cannot be read
    or the gates belong to other factors.
    """
    out = Path(out)
    if rank < 1:
        raise RecipeError(f"rank: {rank} must be at least 1")
    if out.exists():
        raise OutputError(f"{out}: exists already; choose a new folder")
    check_gates(gates, factors)
    if rank > (most := max((logits.shape[-1] for logits in gates.logits.values()), default=rank)):
        LOG.warning("rank: no matrix has more than %d directions; the adapter is of rank %d, not %d", most, most, rank)
        rank = most
    places = adapter_places(vlm, factors, list(gates.logits), rank)
    tensors: dict[str, Tensor] = {}
    errors: dict[str, float] = {}
    dropped_sum = whole_sum = 0.0
    for name, place in places.items():
        A, B, dropped, whole = lora_factors(factors[name], gates.spectrum(name, factors[name].s.cpu()), rank)
        if A.ndim == 3:
            A, B = _stack_tensors(A, B, place.inputs_first)
        tensors[f"{place.prefix}.lora_A.weight"] = A.to(dtype)
        tensors[f"{place.prefix}.lora_B.weight"] = B.to(dtype)
        errors[name] = (dropped / whole) ** 0.5 if whole > 0 else 0.0
        dropped_sum, whole_sum = dropped_sum + dropped, whole_sum + whole
    base = portable(str(vlm), out)
    report = LoraReport(rank, errors, (dropped_sum / whole_sum) ** 0.5 if whole_sum > 0 else 0.0)
    with new_folder(out) as folder:
        save_tensors(tensors, folder / "adapter_model.safetensors", {"format": "pt"})
        write_json(folder / "adapter_config.json", _config(base, list(places.values()), rank))
        write_json(folder / "report.json", {"rank": rank, "error": report.error, "errors": errors})
        write_receipt(folder, {"rank": rank, "error": report.error, "vlm": base})
    return report


def write_loras(
    vlm: str | Path,
    factors: Mapping[str, Factors],
    path: Mapping[str, Gates],
    out: str | Path,
    rank: int,
    dtype: torch.dtype = torch.bfloat16,
) -> dict[str, LoraReport]:
    """Write an adapter of the same rank for each entry of `path`, in a folder of its name in the new folder `out`, so
    that PEFT or a server can switch between them; arguments and errors as `write_lora`."""
    out = Path(out)
    if out.exists():
        raise OutputError(f"{out}: exists already; choose a new folder")
    with new_folder(out) as folder:
        reports = {name: write_lora(vlm, factors, gates, folder / name, rank, dtype) for name, gates in path.items()}
        write_receipt(folder, {"rank": rank, "errors": {name: report.error for name, report in reports.items()}})
    return reports


@dataclass(frozen=True)
class AdapterPlace:
    """Where a matrix's adapter goes. path: its module (for an expert stack, its parameter) in the transformers model.
    prefix: of its tensors in PEFT's file. inputs_first: whether PEFT exchanges our in and out of a stack."""

    path: str
    prefix: str
    stacked: bool = False
    inputs_first: bool = False


def adapter_places(
    vlm: str | Path, factors: Mapping[str, Factors], names: Sequence[str], rank: int
) -> dict[str, AdapterPlace]:
    """Tensor name on disk → its place, from the VLM's config alone (no weights)."""
    model = empty_vlm(vlm)
    paths = {id(module): name for name, module in model.named_modules()}
    linears: dict[str, str] = {}
    stacks: dict[str, tuple[str, ExpertStack]] = {}
    for name, layer in match_projections(model, names).items():
        if isinstance(layer, ExpertSlice):
            raise RecipeError(f"{name}: experts that the files keep one by one are not exported; leave them out")
        if isinstance(layer, ExpertStack):
            stacks[name] = (f"{paths[id(layer.module)]}.{layer.key}", layer)
        else:
            linears[name] = paths[id(layer)]
    places = {name: AdapterPlace(path, f"base_model.model.{path}") for name, path in linears.items()}
    if stacks:
        # found before PEFT wraps the model: if one stack of a module is transposed on disk, all of them are
        turned = {id(s.module) for n, (_, s) in stacks.items() if tuple(s.weight.shape) != factors[n].shape}
        flipped = {
            n: (id(s.module) in turned) != getattr(s.module, "is_transposed", False) for n, (_, s) in stacks.items()
        }
        prefixes = _stack_keys(model, list(linears.values()), [path for path, _ in stacks.values()], rank)
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


def _stack_keys(model: Any, modules: Sequence[str], stacks: Sequence[str], rank: int) -> dict[str, str]:
    """Path of a parameter (module and key) → prefix of its adapter's tensors.

    model: on the meta device; PEFT wraps it, so it cannot be used afterwards. modules: paths of the linear layers that
    the adapter also holds; stacks: those of the parameters. Raises RecipeError if peft is missing.
    """
    try:
        from peft import LoraConfig, get_peft_model
        from peft.tuners.lora.layer import ParamWrapper
    except ImportError:
        raise RecipeError(f"{stacks[0]}: experts need peft to be exported: pip install 'vlmgraft[train]'") from None
    config = LoraConfig(r=rank, lora_alpha=rank, target_modules=list(modules), target_parameters=list(stacks))
    prefixes = {}
    for name, module in get_peft_model(model, config).named_modules():
        if isinstance(module, ParamWrapper):
            path = name.removeprefix("base_model.model.").replace(".base_layer", "")
            prefixes[f"{path}.{module.parameter_name}"] = name
    return prefixes


def _stack_tensors(
    A: Float[Tensor, "experts rank in"], B: Float[Tensor, "experts out rank"], inputs_first: bool
) -> tuple[Float[Tensor, "experts*rank in"], Float[Tensor, "out rank*experts"]]:
    """lora_A and lora_B of a stack whose update is B @ A per expert; `inputs_first`: the model stores its parameter as
    [experts, in, out], so that PEFT exchanges our in and out."""
    if inputs_first:
        A, B = B.mT, A.mT
    return A.reshape(-1, A.shape[-1]).contiguous(), B.permute(1, 2, 0).reshape(B.shape[1], -1).contiguous()
