"""Forms of fused tensors: split and join are inverse, and `assemble` agrees with the definition written out naively."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings, strategies as st

from vlmgraft.alignment.layouts import WHOLE, Form, Layout, Pick, Source, assemble, join, part_shapes, split
from vlmgraft.errors import AlignmentError

SIZES = st.integers(1, 4)


@st.composite
def formed(draw: st.DrawFn) -> tuple[Form, tuple[int, ...]]:
    """A form and a shape that fits it."""
    kind = draw(st.sampled_from(["whole", "wqkv", "gate_up", "down"]))
    if kind == "wqkv":
        heads = (draw(SIZES), draw(SIZES), draw(SIZES))
        tail = draw(st.sampled_from([(), (3,)]))
        return Form("wqkv", heads=heads), (heads[0] * (heads[1] + 2) * heads[2], *tail)
    if kind == "whole":
        return Form(), (3, 2)
    experts, out, inner, transposed = draw(SIZES), draw(SIZES), draw(SIZES), draw(st.booleans())
    out *= 2 if kind == "gate_up" else 1
    shape = (experts, inner, out) if transposed else (experts, out, inner)
    return Form(kind, count=experts, transposed=transposed), shape


@given(formed())
@settings(max_examples=60, deadline=None)
def test_join_inverts_split_and_shapes_are_as_planned(case: tuple[Form, tuple[int, ...]]) -> None:
    form, shape = case
    tensor = torch.randn(shape)
    parts = split(tensor, form)
    assert [tuple(part.shape) for part in parts] == part_shapes(form, shape)
    assert torch.equal(join(parts, form), tensor)


def test_wqkv_interleaves_by_key_value_head() -> None:
    """Naive twin: walk over the heads as InternLM2's attention does."""
    heads, group, dim, hidden = 2, 3, 4, 5
    fused = torch.randn(heads * (group + 2) * dim, hidden)
    q, k, v = split(fused, Form("wqkv", heads=(heads, group, dim)))
    row = 0
    for head in range(heads):
        for member in range(group):
            at = (head * group + member) * dim
            assert torch.equal(q[at : at + dim], fused[row : row + dim])
            row += dim
        for part in (k, v):
            assert torch.equal(part[head * dim : (head + 1) * dim], fused[row : row + dim])
            row += dim


def test_experts_fuse_from_single_ones() -> None:
    experts, feed, hidden = 3, 4, 5
    disk = {f"{e}.{half}": torch.randn(feed, hidden) for e in range(experts) for half in ("gate", "up")}
    for transposed in (False, True):
        form = Form("gate_up", count=experts, transposed=transposed)
        picks = tuple(Pick(number, Form(), 0) for number in range(2 * experts))
        source = Source(tuple(disk), Layout("parts", picks=picks, into=form))
        shape = (experts, hidden, 2 * feed) if transposed else (experts, 2 * feed, hidden)
        fused = assemble(source, disk.__getitem__, shape)
        for expert in range(experts):
            naive = torch.cat([disk[f"{expert}.gate"], disk[f"{expert}.up"]])
            assert torch.equal(fused[expert], naive.T if transposed else naive)


def test_a_fused_source_is_read_once() -> None:
    form = Form("wqkv", heads=(1, 2, 3))
    fused, reads = torch.randn(12, 5), []

    def read(name: str) -> torch.Tensor:
        reads.append(name)
        return fused

    picks = tuple(Pick(0, form, part) for part in range(3))
    assert torch.equal(assemble(Source(("wqkv",), Layout("parts", picks=picks, into=form)), read, (12, 5)), fused)
    assert reads == ["wqkv"]


@pytest.mark.parametrize("donor_rows", [4, 6, 9])
def test_rows_that_are_not_shared_come_from_the_vlm(donor_rows: int) -> None:
    vlm, donor = torch.randn(6, 2).bfloat16(), torch.randn(donor_rows, 2).half()
    shared = min(donor_rows, 6)
    source = Source(("embed",), Layout("rows", rows=shared))
    result = assemble(source, {"embed": donor}.__getitem__, (6, 2), fill=vlm).float()
    assert torch.equal(result[:shared], donor[:shared].float())
    assert torch.equal(result[shared:], vlm[shared:].float())


def test_what_cannot_be_assembled_is_refused() -> None:
    read = {"embed": torch.zeros(4, 2)}.__getitem__
    with pytest.raises(AlignmentError, match="not all rows are shared"):
        assemble(Source(("embed",), Layout("rows", rows=4)), read, (6, 2))
    with pytest.raises(AlignmentError, match=r"assembled to \(4, 2\), not \(3, 2\)"):
        assemble(Source(("embed",), WHOLE), read, (3, 2))
    with pytest.raises(ValueError, match="are not 13 rows"):
        part_shapes(Form("wqkv", heads=(1, 2, 3)), (13, 5))
    with pytest.raises(ValueError, match="odd number"):
        part_shapes(Form("gate_up", count=1), (1, 3, 5))
