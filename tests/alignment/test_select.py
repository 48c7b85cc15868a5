"""Modules and layers as recipes write them, and selections that cannot be met."""

from __future__ import annotations

from typing import Any

import pytest
from header_builders import qwen, qwen_vlm

from vlmgraft.alignment import align
from vlmgraft.alignment.select import select_layers, select_modules, selects
from vlmgraft.alignment.view import text_view
from vlmgraft.errors import AlignmentError


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


@pytest.mark.parametrize(
    ("layers", "chosen"),
    [
        ("all", range(10)),
        ("0-3,7", (0, 1, 2, 3, 7)),
        (" 2 - 4 , 4-5", (2, 3, 4, 5)),
        ([9, 0, 9], (0, 9)),
        (9, (9,)),
        ("3-3", (3,)),
    ],
)
def test_layers_of_ten(layers: Any, chosen: Any) -> None:
    assert select_layers(layers, 10) == frozenset(chosen)


@pytest.mark.parametrize(
    ("layers", "said"),
    [("5-2", "the range 5-2 runs backwards; write 2-5"), ("0--1", "not"), (10, "10 is beyond the last")],
)
def test_ranges_that_select_nothing(layers: Any, said: str) -> None:
    with pytest.raises(AlignmentError, match=said):
        select_layers(layers, 10)


@pytest.mark.parametrize(
    ("entry", "selected"),
    [
        ("attention", True),
        ("mlp", False),
        ("all", True),
        ("llm.*.q_proj.weight", True),
        ("layers.1.self_attn.*", True),
        ("LAYERS.1.*", False),
        ("q_proj", False),
    ],
)
def test_an_entry_is_a_group_or_a_pattern_on_name_or_role(entry: str, selected: bool) -> None:
    role = "layers.1.self_attn.q_proj.weight"
    assert selects(entry, f"llm.{role}", role, "attention") is selected


def test_all_leaves_the_vocabulary_alone() -> None:
    held = text_view(qwen_vlm()).held
    everything = select_modules(["all"], held.values())
    assert set(held) - everything == {"model.embed_tokens.weight", "lm_head.weight"}
    assert not any(name.startswith("visual.") for name in held)
