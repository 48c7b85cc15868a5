"""A LoRA adapter is read as the model that PEFT makes of its base; another kind is refused with a command."""

from __future__ import annotations

import json
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers as T
from safetensors.torch import load_file

from vlmgraft.checkpoint.adapter import Adapted, adapted, merging
from vlmgraft.checkpoint.header import TensorInfo
from vlmgraft.checkpoint.index import open_checkpoint
from vlmgraft.checkpoint.reader import Reader
from vlmgraft.checkpoint.verify import verify
from vlmgraft.errors import CheckpointError
from vlmgraft.pipeline import merge, pair
from vlmgraft.recipe.model import load_recipe

SIZES = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4,
         "num_key_value_heads": 2, "vocab_size": 40, "tie_word_embeddings": False}  # fmt: skip


def base_model(folder: Path) -> Path:
    torch.manual_seed(0)
    T.Qwen2ForCausalLM(T.Qwen2Config(**SIZES)).save_pretrained(folder)
    return folder


def adapter(root: Path, **settings: Any) -> Path:
    """A random adapter of a random base; both in `root`."""
    base = base_model(root / "base")
    chosen = {"r": 3, "lora_alpha": 7, "target_modules": ["q_proj", "down_proj"], "init_lora_weights": False}
    config = peft.LoraConfig(task_type="CAUSAL_LM", **{**chosen, **settings})
    model = peft.get_peft_model(T.AutoModelForCausalLM.from_pretrained(base), config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_()
    model.save_pretrained(root / "adapter")
    return root / "adapter"


def run(message: str) -> None:
    """Run the command between backticks in a message."""
    command = shlex.split(message.split("`")[1])
    assert command[0] == "python"
    subprocess.run([sys.executable, *command[1:]], check=True, capture_output=True)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"use_rslora": True, "rank_pattern": {"down_proj": 2}, "alpha_pattern": {"layers.1.self_attn.q_proj": 5}},
        {"target_modules": ["embed_tokens", "v_proj"]},
        {"modules_to_save": ["lm_head", "norm"]},
        {"bias": "lora_only"},
        {"target_modules": "all-linear"},
    ],
)
def test_read_as_peft_merges_it(settings: dict[str, Any], tmp_path: Path) -> None:
    folder = adapter(tmp_path, **settings)
    merged = peft.AutoPeftModelForCausalLM.from_pretrained(folder).merge_and_unload()
    merged.save_pretrained(tmp_path / "merged")
    expected, before = load_file(tmp_path / "merged" / "model.safetensors"), open_checkpoint(tmp_path / "base")
    opened = open_checkpoint(folder)
    assert opened.tensors.keys() == expected.keys() == before.tensors.keys() and opened.packed
    with Reader(opened) as reader:
        for name, tensor in expected.items():
            assert torch.allclose(reader.tensor(name), tensor, atol=1e-5), name


def test_a_merge_with_an_adapter_keeps_the_digests_of_what_it_read(trio: Path, tmp_path: Path) -> None:
    model = T.AutoModelForCausalLM.from_pretrained(trio / "base")
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
    peft.get_peft_model(model, config).save_pretrained(tmp_path / "adapter")
    recipe = {"vlm": str(trio / "vlm"), "donor": str(tmp_path / "adapter"), "donor_base": str(trio / "base"),
              "method": {"name": "task_arithmetic", "scale": 1.0}}  # fmt: skip
    receipt = merge(recipe, tmp_path / "out")
    assert any("donor: an adapter that changes" in note for note in receipt.notes)
    assert not any(note.startswith("warning: the donor is an adapter") for note in receipt.notes)
    shutil.copytree(trio / "base", tmp_path / "another")
    other = pair(load_recipe({**recipe, "donor_base": str(tmp_path / "another")}))
    (told,) = (note for note in other.notes if note.startswith("warning: the donor is an adapter"))
    assert "(base) than donor_base (another)" in told and "adapter_config.json" in told
    for written in ("receipt.json", "README.md"):
        assert str(tmp_path) not in (text := (tmp_path / "out" / written).read_text()) and str(trio) not in text
    changed = [row for row in receipt.tensors if row.added]
    assert changed and all("q_proj" in row.name for row in changed)
    assert any("lora_A" in name for name in receipt.sources["donor"])
    assert verify(tmp_path / "out", sources={"donor": tmp_path / "adapter"}).unchanged
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    faults = verify(tmp_path / "out", sources={"donor": tmp_path / "adapter"}).faults
    assert [fault.what for fault in faults] == ["its bytes are not what was read"]


@pytest.mark.slow
@pytest.mark.parametrize("settings", [{"use_dora": True}, {"lora_bias": True, "target_modules": ["q_proj"]}])
def test_another_kind_is_refused_with_the_command_that_merges_it(settings: dict[str, Any], tmp_path: Path) -> None:
    folder = adapter(tmp_path, **settings)
    with pytest.raises(CheckpointError, match=f"sets {next(iter(settings))}.*merge_and_unload") as refused:
        open_checkpoint(folder)
    run(str(refused.value))
    expected = peft.AutoPeftModelForCausalLM.from_pretrained(folder).merge_and_unload().state_dict()
    with Reader(open_checkpoint(tmp_path / "adapter-merged")) as reader:
        assert all(torch.allclose(reader.tensor(name), tensor) for name, tensor in expected.items())


def test_what_cannot_be_applied_is_named(tmp_path: Path) -> None:
    folder = adapter(tmp_path)
    file = folder / "adapter_config.json"
    config = json.loads(file.read_text())
    for changes, said in (
        ({"init_lora_weights": "pissa"}, "init_lora_weights 'pissa'"),
        ({"peft_type": "LOHA"}, "peft_type 'LOHA'"),
        ({"lora_alpha": "much"}, "no lora_alpha"),
        ({"base_model_name_or_path": ""}, "names no base_model_name_or_path"),
        ({"base_model_name_or_path": str(folder)}, "adapter on an adapter.*merge_and_unload"),
    ):
        file.write_text(json.dumps({**config, **changes}))
        with pytest.raises(CheckpointError, match=said):
            open_checkpoint(folder)
    file.write_text(json.dumps(config))
    torch.save(load_file(folder / "adapter_model.safetensors"), folder / "adapter_model.bin")
    weights = (folder / "adapter_model.safetensors").read_bytes()
    (folder / "adapter_model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="pickled weights only") as refused:
        open_checkpoint(folder)
    run(str(refused.value))
    assert len((folder / "adapter_model.safetensors").read_bytes()) == len(weights) and open_checkpoint(folder).packed
    for name in ("adapter_model.bin", "adapter_model.safetensors"):
        (folder / name).unlink()
    with pytest.raises(CheckpointError, match=r"adapter_config\.json without adapter_model"):
        open_checkpoint(folder)


def infos(**shapes: tuple[int, ...]) -> dict[str, TensorInfo]:
    names = {name.replace("__", "."): shape for name, shape in shapes.items()}
    return {
        name: TensorInfo(name, "BF16", shape, Path("f"), 0, 2 * shape[0] * shape[1]) for name, shape in names.items()
    }


@pytest.mark.parametrize(
    ("settings", "scaling"),
    [
        ({"lora_alpha": 8}, 2.0),
        ({"lora_alpha": 8, "use_rslora": True}, 4.0),
        ({"lora_alpha": 8, "alpha_pattern": {"q": 2}}, 0.5),
        ({"lora_alpha": 8, "alpha_pattern": {"k": 2}}, 2.0),
        ({}, 2.0),
    ],
)
def test_a_matrix_is_scaled_by_alpha_over_its_own_rank(settings: dict[str, Any], scaling: float) -> None:
    """Rank 4, as the pair's shapes say, whatever `r` is."""
    pair_ = infos(base_model__model__m__q__lora_A__weight=(4, 6), base_model__model__m__q__lora_B__weight=(5, 4))
    whole, packed = adapted(Path("a"), {"r": 16, **settings}, pair_, infos(m__q__weight=(5, 6), m__k__weight=(5, 6)))
    (made,) = packed.values()
    assert list(packed) == ["m.q.weight"] and isinstance(made, Adapted) and not made.turned
    assert made.scaling == scaling
    assert (whole["m.q.weight"].dtype, whole["m.q.weight"].nbytes) == ("F32", 4 * 5 * 6)
    assert (whole["m.k.weight"].dtype, whole["m.k.weight"].nbytes) == ("BF16", 2 * 5 * 6)


def test_a_pair_that_does_not_make_its_matrix_is_refused() -> None:
    pair_ = infos(base_model__model__m__q__lora_A__weight=(4, 6), base_model__model__m__q__lora_B__weight=(5, 3))
    with pytest.raises(CheckpointError, match=r"lora_B\.weight \[5, 3\] times A \[4, 6\] is not \[5, 6\]"):
        adapted(Path("a"), {}, pair_, infos(m__q__weight=(5, 6)))


def test_the_command_takes_a_folder_of_any_name() -> None:
    assert shlex.split(merging(Path("my 'adapter'")))[-2:] == ["my 'adapter'", "my 'adapter'-merged"]
