"""Finding the text model's linear layers inside a model, and loading errors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from torch import nn

from vlmgraft.errors import AlignmentError, CheckpointError
from vlmgraft.hf.models import load_vlm, match_linears, output_head, role_of, text_linears, text_model

PROJECTIONS = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}


def test_the_same_roles_in_a_vlm_and_a_text_model(vlm: Any, llm: Any) -> None:
    roles = text_linears(vlm)
    assert roles.keys() == text_linears(llm).keys()
    assert {role.split(".")[-2] for role in roles} == PROJECTIONS and len(roles) == 28
    tower = {id(module) for module in vlm.model.visual.modules()}
    assert not any(id(linear) in tower for linear in roles.values())
    assert text_model(vlm) is vlm.model.language_model and text_model(llm) is llm.model
    assert output_head(vlm) is vlm.lm_head


@pytest.mark.parametrize(
    "prefix", ["model.", "language_model.model.", "model.text_model.", "model.language_model.", ""]
)
def test_tensor_names_of_every_family_lead_to_the_layer(vlm: Any, prefix: str) -> None:
    role = "layers.3.self_attn.q_proj.weight"
    assert role_of(prefix + role) == role
    assert match_linears(vlm, [prefix + role])[prefix + role] is vlm.model.language_model.layers[3].self_attn.q_proj


def test_a_tensor_without_a_linear_layer_is_named(vlm: Any) -> None:
    with pytest.raises(AlignmentError, match="input_layernorm"):
        match_linears(vlm, ["model.layers.0.input_layernorm.weight"])


def test_a_model_without_a_text_stack_is_refused(vlm: Any) -> None:
    class Empty(nn.Module):
        config = vlm.config

    with pytest.raises(AlignmentError, match="0 modules look like a text model of 4 layers"):
        text_model(Empty())


def test_a_folder_that_is_no_model_is_an_input_error(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=str(tmp_path)):
        load_vlm(tmp_path)
