"""Memory of one card of several, counted by running the stages of FRISM with that card's share on fake tensors.

    python benchmarks/sharded.py --out benchmarks/results/sharded.json    # Qwen2.5-VL-72B on 8 cards, minutes, no card
    python benchmarks/sharded.py --quick                                   # a small model: does it run?

The code is what runs on cards: `fully_shard` over a group of which this process plays one member, `gate_and_shard`,
gated layers with checkpointing, `TargetBatch.kl`, its backward pass. Fake tensors have sizes and no memory. Counted are
bytes of all tensors that live at once: this card's rows of weights and factors, what is replicated, layers gathered for
a moment (one ahead), gates with Adam's moments, inputs, activations, logits. Not counted: the allocator's slack, the
device library's own memory, communication buffers of the network library.
"""

from __future__ import annotations

import argparse
import gc
import json
import weakref
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, Qwen2_5_VLConfig, Qwen2Config

from vlmgraft.distillation import sharding
from vlmgraft.distillation.gate_vector import GateVector
from vlmgraft.distillation.gated_layers import checkpointed
from vlmgraft.distillation.memory import Rank, Shapes, memory_of
from vlmgraft.distillation.sharding import gate_and_shard, shard
from vlmgraft.distillation.targets import TOP_K, Distribution, TargetBatch
from vlmgraft.hf.modules import is_shard, match_projections, output_head, set_tensor, text_linears, text_model
from vlmgraft.spectral.factors import Factors

_LOAD: dict[str, Any] = {"questions": 8, "answered": 32, "prompt": 1000, "told": 100, "answer": 64}


def _qwen(hidden: int, inner: int, layers: int, heads: int) -> dict[str, Any]:
    """Config of text model and tower, as Qwen2.5-VL has them."""
    text = {"hidden_size": hidden, "intermediate_size": inner, "num_hidden_layers": layers, "vocab_size": 152064,
            "num_attention_heads": heads, "num_key_value_heads": 8, "tie_word_embeddings": False}  # fmt: skip
    tower = {"depth": 32, "hidden_size": 1280, "intermediate_size": 3456, "num_heads": 16, "out_hidden_size": hidden}
    return {"text": text, "tower": tower}


SIZES: dict[str, dict[str, Any]] = {
    "72B": {**_qwen(8192, 29568, 80, 64), **_LOAD,
            "cards": 8, "offload": False, "ranks": [256, "full"], "limits": [45.0, 70.0]},
    "32B": {**_qwen(5120, 27648, 64, 40), **_LOAD,
            "cards": 1, "offload": True, "ranks": [64, "full"], "limits": [74.0, 74.0]},
    "quick": {
        "text": {"hidden_size": 256, "intermediate_size": 500, "num_hidden_layers": 3, "num_attention_heads": 2,
                 "num_key_value_heads": 1, "vocab_size": 8192, "tie_word_embeddings": False},
        "tower": {"depth": 1, "hidden_size": 32, "intermediate_size": 32, "num_heads": 2, "out_hidden_size": 256},
        "cards": 3, "questions": 2, "answered": 4, "prompt": 20, "told": 5, "answer": 4, "ranks": [8, "full"],
        "offload": False, "limits": [None, None],
    },
}  # fmt: skip
SIZES["quick offloaded"] = {**SIZES["quick"], "cards": 1, "offload": True}
"""limits: GiB on each card that are asked for, by rank."""

_OWN = {"current_device": lambda: 0, "is_available": lambda: False, "get_amp_supported_dtype": lambda: [torch.bfloat16]}
_setup_privateuseone_for_python_backend("card", SimpleNamespace(**{**vars(torch.cpu), **_OWN}))
CARD = torch.device("card", 0)
"""A device of fake tensors alone, whose streams are the CPU's: what is not on it is in the host's memory."""


class Live(TorchDispatchMode):
    """Bytes of storages that are alive, and their peak; also where they are resized, as FSDP frees gathered layers."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: dict[int, int] = {}
        self.peak = 0
        self._resize = torch.UntypedStorage.resize_

    @property
    def now(self) -> int:
        """Bytes alive."""
        return sum(self.sizes.values())

    def see(self, tensor: torch.Tensor) -> None:
        """Count a tensor's storage from now on, until it is freed; offloaded ones are the host's."""
        tensor = tensor.to_local() if is_shard(tensor) else tensor
        if tensor.device != CARD:
            return
        storage = tensor.untyped_storage()
        if storage._cdata not in self.sizes:
            weakref.finalize(storage, self.sizes.pop, storage._cdata, None)
        if self.sizes.get(storage._cdata) != storage.nbytes():
            self.sizes[storage._cdata] = storage.nbytes()
            self.peak = max(self.peak, self.now)

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor):
                self.see(leaf)
        return result

    def __enter__(self) -> Live:
        def resize(storage: torch.UntypedStorage, size: int) -> Any:
            result = self._resize(storage, size)
            if storage._cdata in self.sizes:
                self.sizes[storage._cdata] = size
                self.peak = max(self.peak, self.now)
            return result

        torch.UntypedStorage.resize_ = resize  # type: ignore[method-assign]
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        torch.UntypedStorage.resize_ = self._resize  # type: ignore[method-assign]
        super().__exit__(*error)


class FakeFactors(Mapping[str, Factors]):
    """Factors of every linear layer, made when they are asked for, as a store reads them."""

    def __init__(self, shapes: Mapping[str, torch.Size], rank: Rank) -> None:
        self.shapes, self.rank = shapes, rank

    def __getitem__(self, name: str) -> Factors:
        out, inner = self.shapes[name]
        r = min(out, inner) if self.rank == "full" else min(out, inner, self.rank)
        return Factors(name, name, torch.empty(out, r), torch.ones(r), torch.empty(r, inner), 1.0, 0.0)

    def __iter__(self) -> Iterator[str]:
        return iter(self.shapes)

    def __len__(self) -> int:
        return len(self.shapes)


def fused_attention(q: Any, k: Any, v: Any, attn_mask: Any = None, is_causal: bool = False, **_: Any) -> torch.Tensor:
    """By the CPU's fused kernel, which keeps what the GPU's does; of a device that it does not know torch would not."""
    flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    return flash(q, k, v, 0.0, is_causal, attn_mask=attn_mask)[0]


@contextmanager
def group(cards: int) -> Iterator[None]:
    """This process as the first of a group whose others answer nothing, on a card whose streams are the CPU's."""
    torch.distributed.init_process_group("cpu:fake,card:fake", store=FakeStore(), rank=0, world_size=cards)
    mesh = sharding.group_mesh(CARD)  # of real numbers
    try:
        with (
            patch.object(sharding, "group_mesh", lambda device: mesh),
            patch.object(torch.nn.functional, "scaled_dot_product_attention", fused_attention),
        ):
            yield
    finally:
        torch.distributed.destroy_process_group()


def held(model: Any, device: torch.device = CARD) -> int:
    """Bytes of the parameters on this card, or of the offloaded ones."""
    parts = {id(p): p.to_local() if is_shard(p) else p for p in model.parameters()}
    return sum(part.numel() * part.itemsize for part in parts.values() if part.device == device)


def made(auto: Any, config: Any, offload: bool, **options: Any) -> Any:
    """A model as it is loaded: on the card, but for layers that are to stay in the host's memory."""
    with CARD:
        model = auto.from_config(config, dtype=torch.bfloat16, **options).eval()
    layers = text_model(model).layers
    for name, parameter in [*layers.named_parameters()] if offload else []:
        set_tensor(layers, name, nn.Parameter(torch.empty_like(parameter, device="cpu"), requires_grad=False))
    return model


def batch_of(model: Any, sizes: Mapping[str, Any]) -> TargetBatch:
    """A batch as training reads it: what the text model is given, and the teacher's likeliest tokens."""
    count, length, said = sizes["questions"], sizes["prompt"] + sizes["answer"], sizes["answer"]
    hidden = torch.empty(count, length, sizes["text"]["hidden_size"], dtype=torch.bfloat16, device=CARD)
    predicts = torch.zeros(count, length, dtype=torch.bool)
    # which rows count is a fact that fake tensors do not hold: rows of the head are taken by number instead
    ids = torch.zeros(count * said, TOP_K, dtype=torch.int64, device=CARD)
    target = Distribution(torch.empty(count * said, TOP_K + 1, device=CARD), ids)
    captured = {"inputs_embeds": hidden, "use_cache": False}
    return TargetBatch(torch.zeros(count, length, dtype=torch.int64), dict, captured, predicts, target)


def loss_of(model: Any, batch: TargetBatch) -> torch.Tensor:
    """`batch.kl(model).mean()` on as many rows as count."""
    rows = len(batch.target.log_p)
    hidden = text_model(model)(**batch.captured)[0].flatten(0, 1)[:rows]  # type: ignore[arg-type]
    return batch.target.kl(output_head(model)(hidden)).mean()


@torch.no_grad()
def peak_of_answers(live: Live, model: Any, questions: int, length: int) -> int:
    """Bytes at once while so many questions are read, with the cache of as many tokens as prompts and answers have."""
    live.peak = live.now
    width = text_model(model).embed_tokens.weight.shape[1]
    embedded = torch.empty(questions, length, width, dtype=torch.bfloat16, device=CARD)
    read = text_model(model)(inputs_embeds=embedded, use_cache=True)
    output_head(model)(read[0][:, -1]).float().argmax(-1)
    return live.peak


def count(sizes: Mapping[str, Any], rank: Rank) -> dict[str, float]:
    """Bytes on one card: of weights and factors, and at once while it answers (`matching`: while a donor of the text
    model's size does, before the VLM is loaded), and in a training step; `formula`: of that step, by the cost model.
    Of offloaded layers also while they are put in place (`loading`), and what they take of the host's memory."""
    config = Qwen2_5_VLConfig(text_config=sizes["text"], vision_config=sizes["tower"])
    length, offload = sizes["prompt"] + sizes["answer"], sizes["offload"]
    found: dict[str, float] = {}
    with group(sizes["cards"]), FakeTensorMode(allow_non_fake_inputs=True), Live() as live:
        text_model = made(AutoModelForCausalLM, Qwen2Config(**sizes["text"]), offload)
        donor = shard(text_model, CARD, offload=offload)
        gc.collect()
        found["matching"] = peak_of_answers(live, donor, sizes["answered"], sizes["told"] + sizes["answer"])
        del text_model, donor
        gc.collect()
        model = made(AutoModelForImageTextToText, config, offload, attn_implementation="sdpa")
        gc.collect()
        live.peak = live.now
        model = shard(model, CARD, offload=offload)
        gc.collect()
        found["weights"] = held(model)
        if offload:
            found["loading"] = live.peak
        found["answering"] = peak_of_answers(live, model, sizes["answered"], length)
        factors = FakeFactors({name: linear.weight.shape for name, linear in text_linears(model).items()}, rank)
        model, layers = gate_and_shard(model, match_projections(model, factors), factors, offload=offload)
        vector = GateVector(factors, device=CARD)
        moments = [torch.empty_like(vector.logits) for _ in range(2)]
        batch = batch_of(model, sizes)
        gc.collect()
        found["factors"] = held(model) - found["weights"]
        if offload:
            found["host"] = held(model, torch.device("cpu"))
        live.peak = live.now
        with checkpointed(model):
            layers.set(vector.spectra(1.0)[0])
            loss_of(model, batch).backward()
        found["gates"] = live.peak
        del moments
    tokens, answers = sizes["questions"] * length, sizes["questions"] * sizes["answer"]
    options: dict[str, Any] = {"tokens": tokens, "answer_tokens": answers, "gpus": sizes["cards"], "offload": offload}
    found["formula"] = memory_of(Shapes.of(config), rank=rank, checkpointing=True, **options).total
    return found


def main() -> None:
    """Count, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a small model on three cards, seconds")
    parser.add_argument("--out", type=Path, help="JSON file for the rows")
    arguments = parser.parse_args()
    rows = []
    for name in [name for name in SIZES if name.startswith("quick") == arguments.quick]:
        sizes = SIZES[name]
        for rank, limit in zip(sizes["ranks"], sizes["limits"], strict=True):
            found = count(sizes, rank)
            rows.append({"model": name, "cards": sizes["cards"], "rank": rank, "limit": limit, **found})
            gibs = "  ".join(f"{key} {found[key] / 2**30:.4g}" for key in found)
            print(f"{name} on {sizes['cards']} cards, rank {rank}, GiB on each: {gibs}", flush=True)
    if arguments.out:
        arguments.out.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
