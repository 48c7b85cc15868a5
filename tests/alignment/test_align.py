"""Pairing on headers alone: verdicts, reasons, and refusals that name tensor, shapes and remedy."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from header_builders import LLAMA, decoder, headers, qwen, qwen_vlm, tower, verdicts

from vlmgraft.alignment import align
from vlmgraft.errors import AlignmentError


def test_every_tensor_has_one_verdict_in_disk_order() -> None:
    vlm = qwen_vlm()
    alignment = align(vlm, qwen(), qwen("base"))
    assert [tensor.name for tensor in alignment.tensors] == list(vlm.tensors)
    assert Counter(verdicts(alignment).values()) == {"merged": 14, "excluded": 6 + 5 + 2, "kept": 1}
    assert all(tensor.donor and tensor.donor_base and tensor.donor.streamable for tensor in alignment.merged)
    assert all(tensor.donor is None for tensor in alignment.tensors if tensor.verdict != "merged")
    assert all(tensor.reason for tensor in alignment.tensors)
    assert (alignment.layers, alignment.family, alignment.notes) == (2, "qwen2_5_vl", ())


def test_donor_with_other_layers_or_family_is_refused() -> None:
    with pytest.raises(AlignmentError, match=r"3 layers.*has 2"):
        align(qwen_vlm(), qwen(layers=3))
    with pytest.raises(AlignmentError, match=r"is a llama model.*is qwen2"):
        align(qwen_vlm(), headers("donor", decoder("model.", "lm_head"), LLAMA))


def test_one_folder_in_two_roles_is_refused() -> None:
    with pytest.raises(AlignmentError, match="donor and donor_base are the same folder"):
        align(qwen_vlm(), qwen("same"), qwen("same"))
    with pytest.raises(AlignmentError, match="vlm_base and vlm are the same folder"):
        align(qwen_vlm("same"), qwen(), vlm_base=qwen_vlm("same"))


@pytest.mark.parametrize("nested", [True, False])
def test_quantised_checkpoints_are_refused_as_such(nested: bool) -> None:
    """GPTQ's names (`qweight`) are not a text model's: without the config they would be another architecture."""
    section = {"model_type": "qwen2", "quantization_config": {"quant_method": "gptq", "bits": 4}}
    packed = {name.replace("_proj.weight", "_proj.qweight"): info.shape for name, info in qwen().tensors.items()}
    donor = headers("donor", packed, {"text_config": section} if nested else section, dtype="I32")
    with pytest.raises(AlignmentError, match=r"donor /nowhere/donor: .* quantised by gptq .*I32.*take the BF16"):
        align(qwen_vlm(), donor)


def test_swapped_vlm_and_donor_are_refused() -> None:
    with pytest.raises(AlignmentError, match=r"no vision tower.*swapped"):
        align(qwen(), qwen_vlm())


def test_what_is_not_merged_is_counted() -> None:
    alignment = align(qwen_vlm(), qwen())
    assert alignment.left_out == (
        "language model: 14 of 27 tensors merged; not merged: 6 bias, 1 embeddings, 1 head, 5 norm"
    )


@pytest.mark.parametrize("model_type", ["llava", "unlisted"])
def test_work_grows_linearly_with_tensors(model_type: str) -> None:
    """Function calls per tensor do not grow with the number of tensors (counted, not timed)."""

    def calls(layers: int) -> int:
        towers = {name: shape for number in range(layers) for name, shape in tower(f"tower.{number}.", 1).items()}
        shapes = {**towers, **decoder("language_model.model.", "language_model.lm_head", layers)}
        vlm = headers("vlm", shapes, {"model_type": model_type, "text_config": LLAMA})
        donor, base = (headers(name, decoder("model.", "lm_head", layers), LLAMA) for name in ("donor", "base"))
        count = 0

        def profile(*_: object) -> None:
            nonlocal count
            count += 1

        sys.setprofile(profile)
        try:
            align(vlm, donor, base, modules=["all", "embeddings", "*_proj.weight"])
        finally:
            sys.setprofile(None)
        return count

    small, large = calls(10), calls(80)
    assert large < 8.5 * small


def test_paths_are_compared_after_resolving(tmp_path: Path) -> None:
    folder, link = tmp_path / "donor", tmp_path / "link"
    folder.mkdir()
    link.symlink_to(folder)
    donor, base = (dataclasses.replace(qwen(), path=path) for path in (folder, link))
    with pytest.raises(AlignmentError, match="same folder"):
        align(qwen_vlm(), donor, base)


def test_a_donor_that_is_itself_a_vlm_gives_its_language_model() -> None:
    """A tuned VLM as donor, or the VLM before its tuning as base: found by the same structure."""
    alignment = align(qwen_vlm(), qwen_vlm("tuned"), qwen(), qwen_vlm("before"))
    assert len(alignment.merged) == 14
    assert all(t.vlm_base is not None and t.vlm_base.names == (t.name,) for t in alignment.merged)


def test_alignment_loads_no_torch() -> None:
    code = "import sys, vlmgraft.alignment, vlmgraft.alignment.distance; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
