"""Every image-text-to-text class of the installed transformers, tiny, merged by headers and by transformers' modules.

A class has a row for every kind of donor: text models of its own kind, text models of other kinds that its config lets
in, and a donor saved as the class itself. `python tests/families/sweep.py [model type …]` prints them; without a model
type it also writes docs/reference/families.json, from which the page of families is made.
"""

from __future__ import annotations

import copy
import json
import re
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import tiny
import torch
import transformers as T
from safetensors.torch import load_file
from transformers.models.auto.processing_auto import PROCESSOR_MAPPING_NAMES

from vlmgraft.alignment import align, assemble
from vlmgraft.checkpoint.index import open_checkpoint
from vlmgraft.errors import VlmgraftError
from vlmgraft.finetuning.push import check_places
from vlmgraft.hf.modules import match_projections

RESULTS = Path(__file__).parents[2] / "docs" / "reference" / "families.json"
EVERYTHING = ("all", "embeddings", "head")
GUESTS = ("llama", "mistral", "qwen2", "qwen3_moe", "gpt_oss", "gemma2")
"""Kinds of text models that are tried behind the tower of every class."""
NOT_TEXT = re.compile(
    r"vision|vqmodel|protein|perceiver|gemma_expert|image_|connector|adapter|^dit|projector|moe_statics"
)
"""Parts of classes that give themselves as their decoder."""
NOT_LINEAR = (
    "gate.",
    "_gate",
    "router",
    "conv",
    "_norm",
    "_fn",
    "_ape",
    "A_log",
    "proj.proj",
    "static_w",
    "weight_proj",
    "l2_clip",
    "bias",
)
"""Parameters of two and more dimensions that are no linear layer's: routers, convolutions, scales."""
Tensors = dict[str, torch.Tensor]


@dataclass
class Row:
    """What came out for one VLM class and one kind of donor. frism, drift: whether the loaded model has the modules
    and the parameters of the default merge, as gates and pushed gradients need them. evaluated: by what."""

    model_type: str
    vlm: str
    donor: str
    merged: int = 0
    default: int = 0
    frism: bool = False
    drift: bool = False
    evaluated: str = ""
    left: list[str] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)
    unmerged: list[str] = field(default_factory=list)
    notes: tuple[str, ...] = ()
    reason: str = ""
    impossible: str = ""

    @property
    def state(self) -> str:
        """ "right", "refused", "not made" or "WRONG"."""
        if self.impossible:
            return "not made"
        if self.reason:
            return "refused"
        silent = self.left and not any("has no place" in note for note in self.notes)
        return "WRONG" if silent or self.wrong or self.unmerged else "right"


def decoder_of(model: Any) -> Any:
    """The language model's stack inside a model, as its class says."""
    decoder = model.get_decoder()
    if decoder is model:
        return model.base_model
    inner = decoder.get_decoder() if hasattr(decoder, "get_decoder") else decoder
    return decoder_of(decoder) if hasattr(decoder, "lm_head") or inner is not decoder else decoder


def twins(config: Any, vlm: Any) -> Iterator[tuple[str, Any]]:
    """(causal class, its config) of a text model whose stack has the VLM's language model's parameters, if any has."""
    text = config.get_text_config(decoder=True)
    names = {name: tuple(p.shape) for name, p in decoder_of(vlm).named_parameters()}
    stem = text.model_type.split("_")[0][:4]

    kinds = [kind for kind in tiny.CAUSAL if kind.startswith(stem) or (stem == "padd" and kind == "ernie4_5")]
    kinds = [kind for kind in kinds if tiny.CAUSAL[kind] != type(vlm).__name__]
    for kind in sorted(kinds, key=lambda kind: (-_shared(kind, text.model_type), kind))[:8]:
        try:
            same = getattr(T, tiny.CAUSAL[kind]).config_class is type(text)
            theirs = text if same else converted(kind, text)
            with torch.device("meta"):
                model = getattr(T, tiny.CAUSAL[kind])(copy.deepcopy(theirs))
            if {name: tuple(p.shape) for name, p in decoder_of(model).named_parameters()} == names:
                yield tiny.CAUSAL[kind], theirs
                return
        except tiny.NOT_MADE:
            continue


def converted(kind: str, text: Any) -> Any:
    """The config of a text model of another kind with the sizes of `text`."""
    own = tiny.tiny_config(kind)
    return type(own).from_dict({**own.to_dict(), **text.to_dict(), "model_type": kind})


def guests(config: Any, kinds: Sequence[str]) -> Iterator[tuple[str, Any, Any]]:
    """(causal class, its config, the VLM's config with it) of the text models that a class takes by their config."""
    own = config.get_text_config(decoder=True).model_type
    if "text_config" not in config.to_dict() or own not in tiny.CAUSAL:
        return
    for kind in kinds:
        text = tiny.tiny_config(kind)
        try:
            whole = type(config).from_dict({**copy.deepcopy(config.to_dict()), "text_config": text.to_dict()})
            with torch.device("meta"):
                model = getattr(T, tiny.VISION[config.model_type])(copy.deepcopy(whole))
                plain = getattr(T, tiny.CAUSAL[kind])(copy.deepcopy(text))
        except tiny.NOT_MADE:
            continue
        if kind != own and type(decoder_of(model)) is type(decoder_of(plain)):
            yield tiny.CAUSAL[kind], text, whole


def _shared(one: str, other: str) -> int:
    """Pieces that two model types begin with alike."""
    pairs = zip(one.split("_"), other.split("_"), strict=False)
    return next((number for number, (a, b) in enumerate(pairs) if a != b), 9)


def parameters(model: Any) -> Tensors:
    """The language model's parameters by their names in its stack, and its head."""
    crossing = getattr(model.config.get_text_config(decoder=True), "cross_attention_layers", None) or ()
    seeing = tuple(f"layers.{number}." for number in crossing)
    named = decoder_of(model).named_parameters()
    decoder = {name: p for name, p in named if not NOT_TEXT.search(name) and not name.startswith(seeing)}
    head = model.get_output_embeddings()
    heads = [module for name, module in model.named_modules() if name.endswith("lm_head")]
    head = head if head is not None else next(iter(heads), None)
    return {**decoder, **({} if head is None else {"head": head.weight})}


def save(model: Any, folder: Path) -> Tensors:
    model.save_pretrained(folder)
    return {n: t for file in sorted(folder.glob("*.safetensors")) for n, t in load_file(file).items()}


def run(vlm: Any, donor_class: str, donor_config: Any, root: Path) -> Row:
    """Make the trio, merge, compare."""
    row = Row(vlm.config.model_type, type(vlm).__name__, donor_class)
    base = tiny.build(donor_class, donor_config)
    before, b = save(vlm, root / "vlm"), save(base, root / "base")
    theirs, ours = parameters(base), parameters(vlm)
    with torch.no_grad():
        tau = {id(p): torch.randn_like(p) for p in {id(p): p for p in theirs.values()}.values()}
        seen = set()
        for key, p in theirs.items():
            if key in ours and id(ours[key]) not in seen:
                ours[key] += tau[id(p)]
                seen.add(id(ours[key]))
        for p in {id(p): p for p in theirs.values()}.values():
            p += tau[id(p)]
        for p in {id(p): p for name, p in base.named_parameters() if ".adapter." not in name}.values():
            if id(p) not in tau:  # of a donor that sees: its tower, which must not reach the VLM
                p += torch.randn_like(p)
    d, expected = save(base, root / "donor"), save(vlm, root / "expected")
    try:
        opened = [open_checkpoint(root / key) for key in ("vlm", "donor", "base")]
        everything = align(*opened, modules=EVERYTHING)
        default = align(*opened)
    except VlmgraftError as error:
        row.reason = f"{type(error).__name__}: {error}".replace(str(root), "")
        return row
    merged = {}
    for tensor in everything.merged:
        own = before[tensor.name]
        delta = assemble(tensor.donor, d.__getitem__, own.shape, fill=own) - assemble(
            tensor.donor_base, b.__getitem__, own.shape, fill=own
        )
        merged[tensor.name] = own + delta
    for key, tensor in expected.items():
        if key in merged and not torch.allclose(merged[key], tensor, atol=1e-4):
            row.wrong.append(key)
        elif key not in merged and not torch.equal(tensor, before[key]):
            row.left.append(key)
    row.notes = everything.notes
    row.merged, row.default = len(merged), len(default.merged)
    chosen = {tensor.name for tensor in default.merged}
    with suppress(VlmgraftError):
        row.frism = bool(match_projections(vlm, chosen))
    with suppress(VlmgraftError):
        check_places(vlm, default)
        row.drift = True
    row.evaluated = evaluated_by(vlm)
    for key, tensor in expected.items():
        inside = tensor.ndim > 1 and ".layers." in "." + key and not any(word in key for word in NOT_LINEAR)
        if inside and key not in chosen and not torch.equal(tensor, before[key]):
            row.unmerged.append(key)
    return row


def evaluated_by(vlm: Any) -> str:
    """What asks a model of this class, by what transformers has for it."""
    if not vlm.can_generate():
        return "the class does not generate"
    return "transformers" if vlm.config.model_type in PROCESSOR_MAPPING_NAMES else "there is no processor for it"


def rows(only: list[str], folder: Path, kinds: Sequence[str] = GUESTS) -> Iterator[Row]:
    """The rows of every class, or of those of some model types; checkpoints are written into `folder`."""
    for model_type, name in tiny.VISION.items():
        if only and model_type not in only:
            continue
        torch.manual_seed(0)
        try:
            config = tiny.tiny_config(model_type)
            donors = [(donor, text, config) for donor, text in twins(config, tiny.build(name, config))]
            donors += [*guests(config, kinds), (name, config, config)]
        except tiny.NOT_MADE as error:
            yield Row(model_type, name, "?", impossible=f"{type(error).__name__}: {error}"[:200])
            continue
        for number, (donor, donor_config, whole) in enumerate(donors):
            row = run(tiny.build(name, whole), donor, donor_config, folder / f"{model_type}_{number}")
            row.model_type = model_type
            yield row


def known(row: Row) -> dict[str, Any]:
    """A row of the results file."""
    donor = "itself" if row.donor == row.vlm else row.donor.removesuffix("ForCausalLM")
    found = {"vlm": row.vlm, "donor": donor, "state": row.state, "frism": row.frism, "drift": row.drift}
    why = " ".join((row.impossible or re.sub(r"/\w+: ", "", row.reason.partition(": ")[2])).split())[:160]
    return {**found, "evaluated": row.evaluated, **({"why": why} if why else {})}


def main(only: list[str]) -> None:
    """Print the rows; without a choice of model types, write the results file."""
    states: Counter[str] = Counter()
    lines: list[str] = []
    for model_type in only or tiny.VISION:
        with tempfile.TemporaryDirectory() as root:
            for row in rows([model_type], Path(root)):
                states[row.state] += 1
                lines.append(json.dumps(known(row)))
                print(lines[-1], f"merged {row.merged}, default {row.default}", flush=True)
                for key in ("left", "wrong", "unmerged", "reason"):
                    if value := getattr(row, key):
                        print(f"      {key} {value!s:.400}")
    print(dict(states))
    if not only:
        version = json.dumps({"transformers": T.__version__, **states})
        RESULTS.write_text("[\n" + ",\n".join([version, *lines]) + "\n]\n", encoding="utf-8")


if __name__ == "__main__":
    T.logging.set_verbosity_error()
    T.logging.disable_progress_bar()
    main(sys.argv[1:])
