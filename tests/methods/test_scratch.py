"""Memory that is used again: only inside the context, by name, per thread, and large enough."""

from __future__ import annotations

from threading import Thread

import pytest
import torch

from vlmgraft.methods.scratch import reused, scratch

SMALL, LARGE = torch.zeros(2, 3), torch.zeros(5, 7)


def test_outside_every_call_gives_new_memory_of_the_shape_and_dtype() -> None:
    first, second = scratch(SMALL, "a"), scratch(SMALL, "a")
    assert first[0].data_ptr() != second[0].data_ptr()
    assert first[0].shape == SMALL.shape and first[0].dtype == torch.float32


def test_inside_a_name_has_one_memory_and_two_names_have_two() -> None:
    with reused():
        a, b = scratch(LARGE, "a", "b")
        again, small = scratch(LARGE, "a")[0], scratch(SMALL, "a")[0]
        a.fill_(1)
        b.fill_(2)
        assert a.data_ptr() == again.data_ptr() == small.data_ptr() != b.data_ptr()
        assert again.shape == LARGE.shape and again.eq(1).all() and small.shape == SMALL.shape
    assert scratch(LARGE, "a")[0].data_ptr() != a.data_ptr()


def test_a_larger_tensor_gets_larger_memory_and_keeps_it() -> None:
    with reused():
        scratch(SMALL, "grows")
        large = scratch(LARGE, "grows")[0]
        assert large.shape == LARGE.shape
        assert scratch(SMALL, "grows")[0].data_ptr() == scratch(LARGE, "grows")[0].data_ptr() == large.data_ptr()


def test_contexts_nest_and_end_after_an_error() -> None:
    with pytest.raises(KeyError), reused():
        with reused():
            inner = scratch(SMALL, "n")[0]
        assert scratch(SMALL, "n")[0].data_ptr() == inner.data_ptr(), "still inside the outer one"
        raise KeyError
    assert scratch(SMALL, "n")[0].data_ptr() != inner.data_ptr()


def test_another_thread_has_its_own() -> None:
    found: list[int] = []

    def work() -> None:
        outside = scratch(SMALL, "t")[0], scratch(SMALL, "t")[0]
        with reused():
            found.extend([scratch(SMALL, "t")[0].data_ptr(), int(outside[0].data_ptr() == outside[1].data_ptr())])

    with reused():
        mine = scratch(SMALL, "t")[0]
        thread = Thread(target=work)
        thread.start()
        thread.join()
    assert found[0] != mine.data_ptr() and found[1] == 0
