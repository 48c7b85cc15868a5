"""Addresses of servers, as a recipe or a command line gives them."""

from __future__ import annotations

from urllib.parse import urlsplit

from vlmgraft.errors import InputError


def check_url(url: str, what: str) -> None:
    """Raise InputError unless `url` can be a server's address; what: names it in messages."""
    try:
        parts = urlsplit(url)
        fine = parts.scheme in ("http", "https") and bool(parts.hostname) and (parts.port or 1) > 0
    except ValueError:
        fine = False
    if not fine or not url.isascii() or not url.isprintable() or " " in url:
        raise InputError(f"{what}: a server's address must begin with http:// or https://, got {url!r:.80}")
