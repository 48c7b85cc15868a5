"""Pairing on headers alone: verdicts, reasons, and refusals that name tensor, shapes and remedy."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from header_builders import HIDDEN, VOCABULARY, decoder, headers, qwen, qwen_vlm, tower

from vlmgraft.alignment import Alignment, align
from vlmgraft.checkpoint.index import Checkpoint
from vlmgraft.errors import AlignmentError

LLAMA = {"model_type": "llama"}


def verdicts(alignment: Alignment) -> dict[str, str]:
    return {tensor.name: tensor.verdict for tensor in alignment.tensors}


def reason(alignment: Alignment, name: str) -> str:
    return next(tensor.reason for tensor in alignment.tensors if tensor.name == name)


def without(checkpoint: Checkpoint, *names: str, **config: Any) -> Checkpoint:
    kept = {name: info for name, info in checkpoint.tensors.items() if name not in names}
    return dataclasses.replace(checkpoint, tensors=kept, config={**checkpoint.config, **config})


def test_every_tensor_has_one_verdict_in_disk_order() -> None:
    vlm = qwen_vlm()
    alignment = align(vlm, qwen(), qwen("base"))
    assert [tensor.name for tensor in alignment.tensors] == list(vlm.tensors)
    assert Counter(verdicts(alignment).values()) == {"merged": 14, "excluded": 6 + 5 + 2, "kept": 1}
    assert all(tensor.donor and tensor.donor_base and tensor.donor.streamable for tensor in alignment.merged)
    assert all(tensor.donor is None for tensor in alignment.tensors if tensor.verdict != "merged")
    assert all(tensor.reason for tensor in alignment.tensors)
    assert (alignment.layers, alignment.family, alignment.notes) == (2, "qwen2_5_vl", ())


@pytest.mark.parametrize(
    ("modules", "expected"),
    [
        (["attention"], 8),
        (["mlp"], 6),
        (["bias"], 6),
        (["norm"], 5),
        (["embeddings", "head"], 2),
        (["all"], 8 + 6 + 6 + 5),
        (["*.q_proj.weight"], 2),
        (["layers.1.*_proj.weight", "norm"], 7 + 5),
    ],
)
def test_modules_are_groups_or_patterns(modules: list[str], expected: int) -> None:
    assert len(align(qwen_vlm(), qwen(), modules=modules).merged) == expected


@pytest.mark.parametrize(("layers", "expected"), [("all", 14), ("1", 7), (1, 7), ("0-1", 14), ([0], 7), ("0,1", 14)])
def test_layers_are_all_a_range_or_a_list(layers: Any, expected: int) -> None:
    assert len(align(qwen_vlm(), qwen(), layers=layers).merged) == expected


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"modules": ["atention"]}, "did you mean 'attention'"),
        ({"modules": ["visual.*"]}, "never merged"),
        ({"modules": []}, "selects no tensor"),
        ({"layers": "0-2"}, "2 is beyond the last layer, 1"),
        ({"layers": "first"}, 'not "all"'),
        ({"layers": []}, "selects no layer"),
        ({"layers": "0-1,1-0"}, "the range 1-0 runs backwards; write 0-1"),
    ],
)
def test_selections_that_cannot_be_met_are_refused(options: dict[str, Any], said: str) -> None:
    with pytest.raises(AlignmentError, match=said):
        align(qwen_vlm(), qwen(), **options)


def test_donor_of_another_shape_names_tensor_and_both_shapes() -> None:
    with pytest.raises(
        AlignmentError, match=r"model\.layers\.0\.self_attn\.q_proj\.weight: \[8, 8\].*\[16, 16\].*/nowhere/donor"
    ):
        align(qwen_vlm(), qwen(hidden=16))


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


def test_incomplete_or_foreign_donor_is_refused() -> None:
    with pytest.raises(AlignmentError, match=r"q_proj\.weight: donor .* has no layers\.1\.self_attn\.q_proj"):
        align(qwen_vlm(), without(qwen(), "model.layers.1.self_attn.q_proj.weight"))
    layer = [name for name in qwen(layers=3).tensors if ".layers.1." in name]
    with pytest.raises(AlignmentError, match=r"decoder layers \[1\] are missing"):
        align(qwen_vlm(), without(qwen(layers=3), *layer))
    extra = {"model.layers.0.self_attn.q_norm.weight": (4,), **decoder("model.", "lm_head", bias=True)}
    with pytest.raises(AlignmentError, match=r"q_norm.*no place"):
        align(qwen_vlm(), headers("donor", extra, {}))


def test_quantised_donor_is_refused() -> None:
    with pytest.raises(AlignmentError, match="stored as I8"):
        align(qwen_vlm(), qwen(dtype="I8"))


@pytest.mark.parametrize("nested", [True, False])
def test_quantised_checkpoints_are_refused_as_such(nested: bool) -> None:
    """GPTQ's names (`qweight`) are not a text model's: without the config they would be another architecture."""
    section = {"model_type": "qwen2", "quantization_config": {"quant_method": "gptq", "bits": 4}}
    packed = {name.replace("_proj.weight", "_proj.qweight"): info.shape for name, info in qwen().tensors.items()}
    donor = headers("donor", packed, {"text_config": section} if nested else section, dtype="I32")
    with pytest.raises(AlignmentError, match=r"donor /nowhere/donor: .* quantised by gptq .*I32.*take the BF16"):
        align(qwen_vlm(), donor)


def test_biases_on_one_side_are_kept_or_noted() -> None:
    alignment = align(qwen_vlm(), qwen(bias=False), modules=["all"])
    name = "model.layers.0.self_attn.q_proj.bias"
    assert verdicts(alignment)[name] == "kept"
    assert "donor has no layers.0.self_attn.q_proj.bias" in reason(alignment, name)
    bare = headers("vlm", {**decoder("model.", "lm_head"), "visual.merger.weight": (6, 6)}, qwen_vlm().config)
    assert "q_proj.bias and 5 more has no place" in align(bare, qwen()).notes[0]


def test_other_dtypes_are_noted() -> None:
    assert align(qwen_vlm(), qwen(dtype="F16")).notes == (
        "14 tensors are F16 in donor and BF16 in the VLM: computed in float32, stored as BF16",
    )


def test_a_vocabulary_of_another_length_shares_its_first_rows() -> None:
    longer = {**decoder("model.", "lm_head", bias=True), "model.embed_tokens.weight": (VOCABULARY + 4, HIDDEN)}
    shorter = {**decoder("model.", "lm_head", bias=True), "model.embed_tokens.weight": (VOCABULARY - 3, HIDDEN)}
    donor, base = headers("donor", longer, {"model_type": "qwen2"}), headers("base", shorter, {"model_type": "qwen2"})
    tensor = align(qwen_vlm(), donor, modules=["embeddings"]).merged[0]
    assert tensor.donor is not None and (tensor.donor.layout.kind, tensor.donor.layout.rows) == ("rows", VOCABULARY)
    tensor = align(qwen_vlm(), donor, base, modules=["embeddings"]).merged[0]
    assert tensor.donor is not None and tensor.donor_base is not None
    assert tensor.donor.layout.rows == tensor.donor_base.layout.rows == VOCABULARY - 3
    assert f"first {VOCABULARY - 3} of {VOCABULARY} rows" in tensor.reason


def test_a_tied_donor_gives_its_embeddings_as_head() -> None:
    tied = without(qwen(), "lm_head.weight", tie_word_embeddings=True)
    (tensor,) = align(qwen_vlm(), tied, modules=["head"]).merged
    assert tensor.donor is not None and tensor.donor.names == ("model.embed_tokens.weight",) and tensor.donor.streamable
    assert "ties its head" in tensor.reason


def test_a_missing_head_is_kept() -> None:
    headless = without(qwen(), "lm_head.weight", tie_word_embeddings=False)
    alignment = align(qwen_vlm(), headless, modules=["attention", "head"])
    assert verdicts(alignment)["lm_head.weight"] == "kept"
    assert "donor has no lm_head.weight" in reason(alignment, "lm_head.weight")
    bare_model = {name.removeprefix("model."): info.shape for name, info in headless.tensors.items()}
    donor = headers("donor", bare_model, {"model_type": "qwen2", "architectures": ["Qwen2Model"]})
    assert verdicts(align(qwen_vlm(), donor, modules=["attention", "head"])) == verdicts(alignment)


def test_a_tied_vlm_has_no_place_for_the_donors_head() -> None:
    alignment = align(without(qwen_vlm(), "lm_head.weight"), qwen(), modules=["all", "embeddings"])
    assert any("lm_head.weight has no place" in note for note in alignment.notes)


def test_any_family_is_aligned_by_structure() -> None:
    shapes = {**tower(hidden=HIDDEN), **decoder("llm.core.", "llm.lm_head")}
    vlm = headers("vlm", shapes, {"model_type": "new_vlm"})
    alignment = align(vlm, headers("donor", decoder("model.", "lm_head"), LLAMA), modules=["attention", "head"])
    assert {tensor.name.split("layers")[0] for tensor in alignment.merged} == {"llm.core.", "llm.lm_head.weight"}
    assert alignment.family == "new_vlm"


def test_a_tower_made_of_a_language_model_stays_untouched() -> None:
    """Its layers fit the donor, and it has token embeddings; the text section tells which stack is meant."""
    vlm = headers(
        "vlm",
        {**decoder("encoder.", None, layers=3), **decoder("model.", "lm_head"), "projector.weight": (8, 8)},
        {"model_type": "reader", "text_config": {"model_type": "qwen2", "num_hidden_layers": 2}},
    )
    alignment = align(vlm, qwen(bias=False), modules=["all", "embeddings", "head"])
    assert all(tensor.name.startswith(("model.", "lm_head.")) for tensor in alignment.merged)
    with pytest.raises(AlignmentError, match=r"donor .* has 3 layers, the VLM .* has 2"):
        align(vlm, qwen(layers=3, bias=False))


def test_swapped_vlm_and_donor_are_refused() -> None:
    with pytest.raises(AlignmentError, match=r"no vision tower.*swapped"):
        align(qwen(), qwen_vlm())


def test_what_is_not_merged_is_counted() -> None:
    alignment = align(qwen_vlm(), qwen())
    assert alignment.left_out == (
        "language model: 14 of 27 tensors merged; not merged: 6 bias, 1 embeddings, 1 head, 5 norm"
    )


@pytest.mark.parametrize(
    ("shapes", "said"),
    [
        ({**decoder("one.", None), **decoder("two.", None)}, r"one\.layers\.\*, two\.layers\.\* all have token"),
        ({**decoder("one.", None, layers=3), **tower()}, "has 2 layers, the VLM .* has 3"),
        ({**decoder("one.", None, hidden=16), **tower()}, r"q_proj\.weight: \[16, 16\] in the VLM, \[8, 8\] in donor"),
        (tower(hidden=HIDDEN), "no stack of layers has token embeddings"),
        ({"blocks.0.weight": (4, 4)}, "no stack of layers has token embeddings"),
    ],
)
def test_structure_that_does_not_tell_is_refused_with_the_reason(shapes: dict[str, Any], said: str) -> None:
    with pytest.raises(AlignmentError, match=said):
        align(headers("vlm", shapes, {"model_type": "new_vlm"}), headers("donor", decoder("model.", "lm_head"), LLAMA))


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
