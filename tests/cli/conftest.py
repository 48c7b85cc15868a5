"""Makes this folder's helper modules importable; recipes on the trio, and what stands in for a public function."""

from __future__ import annotations

import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import yaml

sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture
def recipe(trio: Path, tmp_path: Path) -> Callable[..., Path]:
    def write(file: str, **method: Any) -> Path:
        places = {"vlm": "vlm", "donor": "donor", "donor_base": "base"}
        path = tmp_path / f"{file}.yaml"
        path.write_text(yaml.safe_dump({**{key: str(trio / one) for key, one in places.items()}, "method": method}))
        return path

    return write


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[tuple[tuple[Any, ...], dict[str, Any]]]]:
    """`stand_in(module, name, result)`: a function that does nothing; the list of what it is called with.

    Called with an exception for a result, it raises that.
    """

    def put(module: str, name: str, result: Any = None) -> list[tuple[tuple[Any, ...], dict[str, Any]]]:
        calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

        def called(*args: Any, **kwargs: Any) -> Any:
            calls.append((args, kwargs))
            if isinstance(result, BaseException):
                raise result
            return result

        monkeypatch.setattr(import_module(module), name, called)
        return calls

    return put
