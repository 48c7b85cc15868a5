"""Config files as the hub has them: which kind of text model."""

from __future__ import annotations

from typing import Any

import pytest

from vlmgraft.alignment.families import same_kind, text_type


@pytest.mark.parametrize(
    ("config", "kind"),
    [
        ({"model_type": "qwen2"}, "qwen2"),
        ({"model_type": "qwen2_vl", "hidden_size": 8, "vision_config": {}}, "qwen2"),
        ({"model_type": "qwen2_5_vl", "text_config": {"model_type": "qwen2_5_vl_text"}}, "qwen2"),
        ({"model_type": "qwen3_vl_moe", "text_config": {"model_type": "qwen3_vl_moe_text"}}, "qwen3_moe"),
        ({"model_type": "llava", "text_config": {"_name_or_path": "lmsys/vicuna-7b-v1.5"}}, "llama"),
        ({"model_type": "llava_next", "text_config": {"model_type": "mistral"}}, "mistral"),
        ({"model_type": "internvl_chat", "llm_config": {"model_type": "internlm2"}}, "llama"),
        ({"model_type": "internvl_chat", "llm_config": {"model_type": "qwen2"}}, "qwen2"),
        ({"model_type": "gemma3", "text_config": {"model_type": "gemma3_text"}}, "gemma3"),
        ({"model_type": "brand_new", "vision_config": {"depth": 2}}, None),
        ({"model_type": "cohere2"}, "cohere2"),
        ({}, None),
    ],
)
def test_kind_of_text_model(config: dict[str, Any], kind: str | None) -> None:
    assert text_type(config) == kind


@pytest.mark.parametrize(
    ("vlm", "donor", "same"),
    [
        ("qwen2", "qwen2", True),
        ("glm4v_moe_text", "glm4_moe", True),
        ("hunyuan_vl_text", "hunyuan_v1_dense", True),
        ("glm4v_text", "glm", False),
        ("cohere2", "cohere", False),
        ("granite", "llama", False),
        ("emu3_text_model", "mistral", False),
        ("qwen3", "qwen3_moe", False),
    ],
)
def test_kinds_of_one_name_are_one_architecture(vlm: str, donor: str, same: bool) -> None:
    assert same_kind(vlm, donor) is same is same_kind(donor, vlm)
