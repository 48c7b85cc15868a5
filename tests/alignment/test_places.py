"""Where the language model of a checkpoint is: by its stack of layers with embeddings, and where that does not tell."""

from __future__ import annotations

from typing import Any

import pytest
from header_builders import HIDDEN, LLAMA, decoder, headers, qwen, tower

from vlmgraft.alignment import align
from vlmgraft.alignment.families import Place
from vlmgraft.alignment.places import find_place
from vlmgraft.errors import AlignmentError


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


@pytest.mark.parametrize(
    ("model_type", "body", "head"),
    [
        ("qwen2_5_vl", "model.", "lm_head"),
        ("qwen2_5_vl", "model.language_model.", "lm_head"),
        ("llava", "language_model.model.", "language_model.lm_head"),
        ("llava", "model.language_model.", "lm_head"),
        ("llava", "model.", "lm_head"),
    ],
)
def test_places_that_releases_have_used(model_type: str, body: str, head: str) -> None:
    """The original LLaVA repository keeps its vision tower under the text model's own prefix."""
    shapes = {**tower("model.vision_tower.vision_tower.encoder."), **decoder(body, head)}
    vlm = headers("vlm", shapes, {"model_type": model_type, "text_config": LLAMA})
    alignment = align(vlm, headers("donor", decoder("model.", "lm_head"), LLAMA), modules=["all", "embeddings", "head"])
    assert [note[:45] for note in alignment.notes] == ["not every checkpoint has a tokenizer.json: wh"]
    assert {tensor.name for tensor in alignment.merged} == set(decoder(body, head))


@pytest.mark.parametrize(
    ("shapes", "config", "place"),
    [
        (decoder("model.", "lm_head"), {}, Place("model.", "lm_head", "layers.", "embed_tokens")),
        (decoder("", None), {}, Place("", "lm_head", "layers.", "embed_tokens")),
        (
            {**tower(), **decoder("a.b.", "a.output"), "head.weight": (20, 8)},
            {},
            Place("a.b.", "a.output", "layers.", "embed_tokens"),
        ),
        (
            {f"transformer.h.{layer}.attn.weight": (8, 8) for layer in range(2)} | {"transformer.wte.weight": (20, 8)},
            {},
            Place("transformer.", "lm_head", "h.", "wte"),
        ),
        (
            {**decoder("one.", None, layers=3), **decoder("two.", None)},
            {"text_config": {"num_hidden_layers": 3}},
            Place("one.", "lm_head", "layers.", "embed_tokens"),
        ),
        (
            {**decoder("one.", None), **decoder("two.", None, hidden=16)},
            {"text_config": {"num_hidden_layers": 2, "hidden_size": 16}},
            Place("two.", "lm_head", "layers.", "embed_tokens"),
        ),
    ],
    ids=["a text model", "no prefix", "the innermost head", "other names", "by depth", "by width"],
)
def test_a_place_is_where_layers_and_embeddings_stand_together(
    shapes: dict[str, Any], config: dict[str, Any], place: Place
) -> None:
    assert find_place(headers("vlm", shapes, config)) == place


def test_an_encoder_and_a_decoder_are_refused() -> None:
    with pytest.raises(AlignmentError, match=r"is an encoder and a decoder \('t5'\)"):
        find_place(headers("vlm", decoder("model.", "lm_head"), {"model_type": "t5", "is_encoder_decoder": True}))
