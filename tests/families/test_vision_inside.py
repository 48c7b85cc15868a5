"""Language models whose files hold vision in their decoder layers, or experts that the model fuses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import sweep
import tiny
import torch
import transformers as T
from PIL import Image
from safetensors.torch import load_file, save_file

from vlmgraft import merge
from vlmgraft.alignment import align, assemble
from vlmgraft.checkpoint.index import open_checkpoint
from vlmgraft.errors import AlignmentError


def saved(name: str, config: Any, folder: Path) -> tuple[Any, Path]:
    torch.manual_seed(len(str(folder)))
    model = tiny.build(name, config)
    model.save_pretrained(folder)
    return model, folder


def merged_sources(vlm: Path, donor: Path) -> dict[str, torch.Tensor]:
    """Every tensor of the VLM that the default modules merge, made of the donor's."""
    alignment = align(open_checkpoint(vlm), open_checkpoint(donor))
    read = load_file(donor / "model.safetensors").__getitem__
    return {t.name: assemble(t.donor, read, alignment.vlm.tensors[t.name].shape) for t in alignment.merged if t.donor}


def loaded(vlm: Path, changed: dict[str, torch.Tensor], out: Path) -> dict[str, torch.Tensor]:
    """The decoder's parameters, as transformers reads them, of the VLM with `changed` in place of its tensors."""
    out.mkdir()
    tensors = {**load_file(vlm / "model.safetensors"), **{name: t.contiguous() for name, t in changed.items()}}
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    (out / "config.json").write_bytes((vlm / "config.json").read_bytes())
    return dict(sweep.decoder_of(T.AutoModelForImageTextToText.from_pretrained(out)).named_parameters())


def test_llama_donors_fit_between_the_cross_attention_layers_of_llama_vision(tmp_path: Path) -> None:
    config = tiny.tiny_config("mllama")
    text = config.text_config
    text.cross_attention_layers = [1]
    _, vlm = saved("MllamaForConditionalGeneration", config, tmp_path / "vlm")
    sizes = {key: getattr(text, key) for key in ("vocab_size", "hidden_size", "intermediate_size", "rms_norm_eps")}
    heads = {key: getattr(text, key) for key in ("num_attention_heads", "num_key_value_heads")}
    llama = T.LlamaConfig(**sizes, **heads, num_hidden_layers=3)
    donor, folder = saved("LlamaForCausalLM", llama, tmp_path / "donor")
    after = loaded(vlm, merged_sources(vlm, folder), tmp_path / "out")
    before = loaded(vlm, {}, tmp_path / "same")
    for theirs, ours in ((0, 0), (1, 2), (2, 3)):
        for name in ("self_attn.q_proj", "self_attn.o_proj", "mlp.down_proj"):
            expected = donor.get_parameter(f"model.layers.{theirs}.{name}.weight")
            assert torch.equal(after[f"layers.{ours}.{name}.weight"], expected), (ours, name)
    untouched = [name for name in before if name.startswith("layers.1.")]
    assert untouched
    assert all(torch.equal(after[name], before[name]) for name in untouched)


def test_a_qwen3_donor_is_joined_as_molmo2_keeps_its_matrices(tmp_path: Path) -> None:
    config = tiny.tiny_config("molmo2")
    _, vlm = saved("Molmo2ForConditionalGeneration", config, tmp_path / "vlm")
    text = config.text_config
    names = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "head_dim", "num_attention_heads")
    sizes = {key: getattr(text, key) for key in (*names, "num_key_value_heads")}
    donor, folder = saved("Qwen3ForCausalLM", T.Qwen3Config(**sizes), tmp_path / "donor")
    changed = merged_sources(vlm, folder)
    assert len(changed) == 4 * text.num_hidden_layers
    after = loaded(vlm, changed, tmp_path / "out")
    for name, parameter in donor.model.named_parameters():
        if "proj" in name:
            assert torch.equal(after[name], parameter), name


def test_ernie_keeps_the_experts_that_only_images_use(tmp_path: Path) -> None:
    config = tiny.tiny_config("ernie4_5_vl_moe")
    text = config.text_config
    text.mlp_layer_types = ["dense", "sparse", "sparse", "sparse"]
    _, vlm = saved("Ernie4_5_VLMoeForConditionalGeneration", config, tmp_path / "vlm")
    experts = text.moe_num_experts
    shared = T.Ernie4_5_MoeConfig().to_dict().keys() & text.to_dict().keys() - {"model_type", "moe_num_experts"}
    sizes = {key: getattr(text, key) for key in shared} | {"moe_num_experts": experts}
    sizes |= {"moe_intermediate_size": text.moe_intermediate_size[0], "moe_layer_start_index": 1}
    sizes |= {"moe_layer_end_index": text.num_hidden_layers - 1, "moe_layer_interval": 1}
    _, folder = saved("Ernie4_5_MoeForCausalLM", T.Ernie4_5_MoeConfig.from_dict(sizes), tmp_path / "donor")
    changed = merged_sources(vlm, folder)
    donor = load_file(folder / "model.safetensors")
    numbers = {int(name.split("experts.")[1].split(".")[0]) for name in changed if ".experts." in name}
    assert numbers == set(range(experts))
    assert all(torch.equal(tensor, donor[name]) for name, tensor in changed.items())


def test_experts_that_cannot_be_gated_are_refused_before_anything_is_decomposed(tmp_path: Path) -> None:
    """Aria's experts are fused, in modules of their own."""
    config = tiny.tiny_config("aria")
    model, vlm = saved("AriaForConditionalGeneration", config, tmp_path / "vlm")
    name, text = next(sweep.twins(config, model))
    _, base = saved(name, text, tmp_path / "base")
    _, donor = saved(name, text, tmp_path / "the_donor")
    questions = tmp_path / "questions.jsonl"
    questions.write_text("".join(f'{{"question": "What is {n}?", "image": "{n}.png"}}\n' for n in range(4)))
    for number in range(4):
        Image.new("RGB", (8, 8)).save(tmp_path / f"{number}.png")
    calibration = {"data": str(questions), "samples": 2, "held_out": 2}
    models = {"vlm": str(vlm), "donor": str(donor), "donor_base": str(base)}
    recipe = {**models, "method": {"name": "frism", "calibration": calibration}}
    with pytest.raises(AlignmentError, match="its experts have other names, or another layout, in the model"):
        merge(recipe, tmp_path / "out", workdir=tmp_path / "work")
    assert not list((tmp_path / "work").rglob("*.safetensors"))
