"""GGUF files are read as transformers' own conversion reads them, tensor by tensor."""

from __future__ import annotations

import random
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers as T

from vlmgraft.alignment.align import align
from vlmgraft.checkpoint.ggml import Ggml, gguf_matrix
from vlmgraft.checkpoint.header import TensorInfo
from vlmgraft.checkpoint.index import open_checkpoint
from vlmgraft.checkpoint.reader import Reader
from vlmgraft.checkpoint.verify import verify
from vlmgraft.errors import AlignmentError, CheckpointError
from vlmgraft.pipeline import merge

gguf = pytest.importorskip("gguf", reason="gguf is not installed")
SIZES = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
         "num_key_value_heads": 2, "vocab_size": 40, "head_dim": 16}  # fmt: skip
NAMES = {
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
    "self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm",
}  # fmt: skip
OUTSIDE = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}


def turned(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """The halves of every head interleaved, as llama.cpp's converter keeps q and k of Llama."""
    return weight.reshape(heads, 2, -1, weight.shape[-1]).swapaxes(1, 2).reshape(weight.shape)


def written(root: Path, kind: str, numbers: str) -> tuple[Path, dict[str, torch.Tensor]]:
    """A random model of a kind as a GGUF file, by the format's own writer, and its weights."""
    torch.manual_seed(0)
    classes = {"llama": "Llama", "qwen2": "Qwen2", "qwen3": "Qwen3", "gemma2": "Gemma2"}[kind]
    sizes = {**SIZES, "head_dim": 128} if kind == "qwen3" else SIZES  # of which transformers reads no other
    config = getattr(T, f"{classes}Config")(**sizes, tie_word_embeddings=kind == "gemma2")
    model = getattr(T, f"{classes}ForCausalLM")(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    (root / "gguf").mkdir()
    writer = gguf.GGUFWriter(root / "gguf" / "model.gguf", kind)
    writer.add_name("tiny")
    writer.add_block_count(2)
    writer.add_context_length(64)
    writer.add_embedding_length(64)
    writer.add_feed_forward_length(96)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_key_length(sizes["head_dim"])
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_vocab_size(40)
    norms = {**NAMES, "post_attention_layernorm": "post_attention_norm", "pre_feedforward_layernorm": "ffn_norm",
             "post_feedforward_layernorm": "post_ffw_norm"} if kind == "gemma2" else NAMES  # fmt: skip
    weights = {name: tensor for name, tensor in model.state_dict().items() if kind != "gemma2" or "lm_head" not in name}
    for name, tensor in weights.items():
        module, _, last = name.rpartition(".")
        *_, layer, inside = module.split(".", 3) if ".layers." in name else ("", "")
        ours = f"blk.{layer}.{norms[inside]}" if ".layers." in name else OUTSIDE[module]
        if kind == "llama" and ("q_proj" in name or "k_proj" in name):
            tensor = turned(tensor, 4 if "q_proj" in name else 2)
        if kind == "gemma2" and "norm" in name:
            tensor = tensor + 1
        data: Any = tensor.numpy()
        if tensor.ndim == 2:
            number = gguf.GGMLQuantizationType[numbers]
            data = gguf.quantize(data, number)
            writer.add_tensor(f"{ours}.{last}", data, raw_dtype=number)
        else:
            writer.add_tensor(f"{ours}.{last}", data)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return root / "gguf", weights


@pytest.mark.parametrize(
    ("kind", "numbers"), [("llama", "Q8_0"), ("qwen2", "Q4_0"), ("qwen3", "BF16"), ("gemma2", "F16")]
)
def test_read_as_transformers_reads_it(kind: str, numbers: str, tmp_path: Path) -> None:
    folder, weights = written(tmp_path, kind, numbers)
    expected = T.AutoModelForCausalLM.from_pretrained(folder, gguf_file="model.gguf", dtype=torch.float32).state_dict()
    for path in (folder, folder / "model.gguf"):
        opened = open_checkpoint(path)
        assert set(opened.tensors) == set(weights)
        with Reader(opened) as reader:
            for name, tensor in weights.items():
                assert torch.allclose(reader.tensor(name), expected[name]), name
                scale = {"Q8_0": 1 / 127, "Q4_0": 1 / 7, "BF16": 1 / 128, "F16": 1 / 1024}[numbers]
                assert (reader.tensor(name) - tensor).abs().max() < scale * tensor.abs().max(), name


def test_a_gguf_donor_is_merged_and_its_error_noted(tmp_path: Path) -> None:
    folder, _ = written(tmp_path, "qwen2", "Q8_0")
    base = T.AutoModelForCausalLM.from_pretrained(folder, gguf_file="model.gguf", dtype=torch.bfloat16)
    plain = T.AutoModelForCausalLM.from_config(base.config)
    plain.load_state_dict(base.state_dict())
    plain.config.quantization_config = None
    plain.save_pretrained(tmp_path / "base")
    text = {key: value for key, value in plain.config.to_dict().items() if key != "quantization_config"}
    tower = {"model_type": "clip_vision_model", "hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 1,
             "num_attention_heads": 2, "image_size": 16, "patch_size": 8, "projection_dim": 8}  # fmt: skip
    config = T.LlavaConfig(text_config=text, vision_config=tower, image_token_index=5)
    T.LlavaForConditionalGeneration(config).to(torch.bfloat16).save_pretrained(tmp_path / "vlm")
    recipe = {"vlm": str(tmp_path / "vlm"), "donor": str(folder), "donor_base": str(tmp_path / "base"),
              "method": {"name": "task_arithmetic", "scale": 1.0}}  # fmt: skip
    receipt = merge(recipe, tmp_path / "out")
    assert not any(str(tmp_path) in note for note in receipt.notes)
    assert any("16 matrices are quantised by gguf" in note and "half a step of Q8_0" in note for note in receipt.notes)
    changed = [row for row in receipt.tensors if row.verdict == "merged"]
    assert len(changed) == 14 and all(0 < row.added < 0.1 for row in changed)  # what rounding the base to bf16 left
    assert "blk.0.attn_q.weight" in receipt.sources["donor"]
    assert verify(tmp_path / "out", sources={"donor": folder}).unchanged


@pytest.mark.parametrize(("kind", "fits"), [("Llama", True), ("Mistral", True), ("Qwen2", False)])
def test_a_file_of_llama_is_of_llama_or_of_those_whose_files_say_llama(kind: str, fits: bool, tmp_path: Path) -> None:
    folder, _ = written(tmp_path, "llama", "F16")
    tower = {"model_type": "clip_vision_model", "hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 1,
             "num_attention_heads": 2, "image_size": 16, "patch_size": 8, "projection_dim": 8}  # fmt: skip
    text = getattr(T, f"{kind}Config")(**SIZES)
    config = T.LlavaConfig(text_config=text, vision_config=tower, image_token_index=5)
    T.LlavaForConditionalGeneration(config).save_pretrained(tmp_path / "vlm")
    vlm, donor = open_checkpoint(tmp_path / "vlm"), open_checkpoint(folder)
    if fits:
        assert align(vlm, donor).merged
    else:
        with pytest.raises(AlignmentError, match=r"donor .* is a llama model, the language model of .* is qwen2"):
            align(vlm, donor)


@pytest.mark.slow
def test_what_is_not_undone_tensor_by_tensor_is_refused_with_a_command(tmp_path: Path) -> None:
    folder, _ = written(tmp_path, "qwen2", "Q8_0")
    file = folder / "model.gguf"
    data = file.read_bytes()
    (folder / "other.gguf").write_bytes(data)
    with pytest.raises(CheckpointError, match=r"2 GGUF files; give one of them, such as .*model\.gguf"):
        open_checkpoint(folder)
    (folder / "other.gguf").unlink()
    file.write_bytes(data[:2000])
    with pytest.raises(CheckpointError, match=r"model\.gguf: truncated, .* download it again"):
        open_checkpoint(folder)
    file.write_bytes(data.replace(b"blk.0.attn_k.weight", b"blk.0.attn_z.weight"))
    with pytest.raises(CheckpointError, match=r"qwen2 has no blk\.0\.attn_z\.weight") as refused:
        open_checkpoint(folder)
    file.write_bytes(data)
    command = shlex.split(str(refused.value).split("`")[1])
    subprocess.run([sys.executable, *command[1:]], check=True, capture_output=True)
    with Reader(open_checkpoint(folder)) as ours, Reader(open_checkpoint(folder / "model")) as theirs:
        for name in ours.checkpoint.tensors:
            assert torch.allclose(ours.tensor(name), theirs.tensor(name).float(), rtol=2**-7, atol=1e-6), name


def test_a_number_that_no_config_takes_is_refused(tmp_path: Path) -> None:
    written(tmp_path, "llama", "Q8_0")
    file = tmp_path / "gguf" / "model.gguf"
    raw, key = file.read_bytes(), b"llama.attention.head_count"
    at = raw.index(key) + len(key) + 4  # behind the value's type
    assert raw[at : at + 4] == (4).to_bytes(4, "little")
    file.write_bytes(raw[:at] + (3).to_bytes(4, "little") + raw[at + 4 :])  # 64 is no multiple of it
    with pytest.raises(CheckpointError, match=r"not read tensor by tensor .*3.*; convert it"):
        open_checkpoint(file.parent)


def test_whatever_bytes_are_damaged_it_is_read_or_refused(tmp_path: Path) -> None:
    written(tmp_path, "llama", "Q8_0")
    file, draw, refused = tmp_path / "gguf" / "model.gguf", random.Random(0), 0
    raw = file.read_bytes()
    for _ in range(150):
        damaged = bytearray(raw)
        damaged[draw.randrange(5_000)] = draw.choice((0, 255, draw.randrange(256)))
        file.write_bytes(damaged)
        try:
            open_checkpoint(file.parent)
        except CheckpointError:
            refused += 1
    assert refused > 20


def test_a_block_of_q8_0_is_its_scale_times_its_bytes() -> None:
    """Two rows of one block each: a scale in float16, then 32 signed bytes."""
    values = np.arange(-32, 32, dtype=np.int8)
    blocks = [
        np.array([scale], "<f2").tobytes() + values[32 * row :][:32].tobytes() for row, scale in ((0, 0.5), (1, 0.25))
    ]
    data = np.frombuffer(b"".join(blocks), np.uint8)
    part = TensorInfo("blk.0.ffn_up.weight", "U8", (len(data),), Path("f.gguf"), 0, len(data))
    packed = Ggml({"values": part}, kind="Q8_0", shape=(2, 32), architecture="qwen2")
    expected = np.stack([0.5 * values[:32].astype(np.float32), 0.25 * values[32:].astype(np.float32)])
    np.testing.assert_array_equal(gguf_matrix(packed, data), expected)
    assert packed.error == "half a step of Q8_0" and Ggml({"values": part}, kind="F16").error == ""
