"""Which tensors of donor and bases make up one of the VLM's: parts, vocabularies, heads, and what does not fit."""

from __future__ import annotations

import pytest
from header_builders import HIDDEN, VOCABULARY, decoder, headers, qwen, qwen_vlm, reason, verdicts, without

from vlmgraft.alignment import align
from vlmgraft.alignment.layouts import WHOLE
from vlmgraft.alignment.pair import Pairing, pair_tensor
from vlmgraft.alignment.view import text_view
from vlmgraft.errors import AlignmentError


def test_donor_of_another_shape_names_tensor_and_both_shapes() -> None:
    with pytest.raises(
        AlignmentError, match=r"model\.layers\.0\.self_attn\.q_proj\.weight: \[8, 8\].*\[16, 16\].*/nowhere/donor"
    ):
        align(qwen_vlm(), qwen(hidden=16))


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


def test_one_tensor_is_paired_by_its_role_in_every_checkpoint() -> None:
    """The donor's names have no prefix, the VLM's another one; equal form, shape and dtype are taken as they are."""
    vlm = text_view(headers("vlm", decoder("model.language_model.", "lm_head"), {}))
    donor = text_view(
        headers(
            "donor", {name.removeprefix("model."): info.shape for name, info in qwen(bias=False).tensors.items()}, {}
        )
    )
    base = text_view(qwen("base", bias=False))
    pairing = Pairing(vlm, {"donor": donor, "donor_base": base})
    name = "model.language_model.layers.1.mlp.up_proj.weight"
    said, found = pair_tensor(pairing, vlm.held[name])
    assert said == "language model, mlp" and found is not None
    assert found["donor"].names == ("layers.1.mlp.up_proj.weight",) and found["donor"].layout == WHOLE
    assert found["donor_base"].names == ("model.layers.1.mlp.up_proj.weight",) and "vlm_base" not in found
    assert pairing.notes() == []


def test_rows_of_other_tokens_are_left_out_of_a_vocabulary() -> None:
    """Tokens 2 and 5 are others'; row 19 is beyond the shorter vocabulary and needs no exception."""
    shorter = {**decoder("model.", "lm_head", bias=True), "model.embed_tokens.weight": (VOCABULARY - 3, HIDDEN)}
    vlm, donor = text_view(qwen_vlm()), text_view(headers("donor", shorter, {"model_type": "qwen2"}))
    pairing = Pairing(vlm, {"donor": donor}, foreign=frozenset({5, 2, VOCABULARY - 1}))
    said, found = pair_tensor(pairing, vlm.held["model.embed_tokens.weight"])
    assert found is not None and found["donor"].layout.rows == VOCABULARY - 3
    assert found["donor"].layout.kept == (2, 5)
    assert f"share the first {VOCABULARY - 3} of {VOCABULARY} rows but 2 of other tokens" in said
