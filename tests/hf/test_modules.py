"""Finding the text model and its linear layers inside a model, whatever its tensors are called on disk."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from vlmgraft.errors import AlignmentError
from vlmgraft.hf.modules import match_linears, output_head, role_of, text_linears, text_model

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


def test_a_stack_whose_embeddings_have_another_name_is_found() -> None:
    """Nemotron-H calls its token embeddings `embeddings`."""
    import transformers as T

    sizes = {"hidden_size": 16, "intermediate_size": 16, "vocab_size": 32, "num_attention_heads": 2}
    mamba = {"mamba_num_heads": 2, "mamba_head_dim": 8, "ssm_state_size": 4, "n_groups": 1}
    config = T.NemotronHConfig(
        **sizes, **mamba, num_key_value_heads=2, head_dim=8, layers_block_type=["mamba", "attention"]
    )
    with torch.device("meta"):
        model = T.NemotronHForCausalLM(config)
    assert text_model(model) is model.get_decoder()
