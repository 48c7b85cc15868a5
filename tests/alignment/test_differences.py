"""Configs that do not agree: which fields, and that a merge says so."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from header_builders import qwen, qwen_vlm

from vlmgraft.alignment import align
from vlmgraft.alignment.differences import config_differences

VLM = {"rope_theta": 1e6, "hidden_act": "silu", "rms_norm_eps": 1e-6, "num_attention_heads": 2}


def pair(**changes: Any) -> tuple[Any, Any]:
    vlm, donor = qwen_vlm(), qwen()
    text = {**vlm.config["text_config"], **VLM}
    return replace(vlm, config={**vlm.config, "text_config": text}), replace(
        donor, config={**donor.config, **VLM, **changes}
    )


@pytest.mark.parametrize(("field", "value"), [("rope_theta", 1e4), ("hidden_act", "gelu"), ("num_attention_heads", 4)])
def test_what_changes_the_meaning_of_weights_is_in_the_notes_of_a_merge(field: str, value: Any) -> None:
    notes = align(*pair(**{field: value})).notes
    assert [note for note in notes if note.startswith(f"warning: {field} is {VLM[field]} in the VLM, {value} in donor")]


def test_agreement_and_small_matters_are_not() -> None:
    assert not align(*pair()).notes
    assert not align(*pair(rms_norm_eps=1e-5)).notes
    assert [row.field for row in config_differences(*pair(rms_norm_eps=1e-5), "donor")] == ["rms_norm_eps"]


@pytest.mark.parametrize("rope", [{"rope_theta": 1e6, "rope_type": "default"}, {"rope_theta": 1e6, "type": "mrope"}])
def test_rotary_settings_are_compared_under_their_old_and_new_names(rope: dict[str, Any]) -> None:
    assert not list(config_differences(*pair(rope_theta=None, rope_parameters=rope), "donor"))


def test_rotary_settings_that_are_no_mapping_are_none() -> None:
    assert not list(config_differences(*pair(rope_parameters=[1]), "donor"))
