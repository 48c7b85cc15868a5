"""Prompts with answers: which tokens stand for images."""

from __future__ import annotations

from typing import Any

from vlmgraft.distillation.prompts import before_placeholders, placeholders


def test_an_answer_ends_before_an_images_placeholder(vlm: Any) -> None:
    assert placeholders(vlm) == {vlm.config.image_token_id, vlm.config.video_token_id}
    assert before_placeholders({7, 6}, [1, 2, 7, 3]) == [1, 2] and before_placeholders({7}, [1, 2]) == [1, 2]
