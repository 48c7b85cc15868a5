"""Addresses of servers."""

from __future__ import annotations

import pytest

from vlmgraft.errors import InputError
from vlmgraft.storage.urls import check_url


@pytest.mark.parametrize("url", ["http://a:80o0/v1", "http://[::1", "http:///v1", "http://a b/v1", "ftp://a/v1", ""])
def test_an_address_that_is_none_is_refused(url: str) -> None:
    with pytest.raises(InputError, match=r"method\.x: a server's address must begin with http"):
        check_url(url, "method.x")


@pytest.mark.parametrize("url", ["http://127.0.0.1:8000/v1", "https://models.example/v1/", "http://[::1]:8000/v1"])
def test_an_address_is_taken(url: str) -> None:
    check_url(url, "method.x")
