"""A method with every kind of option, and a recipe of it."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar, Literal


@dataclasses.dataclass(frozen=True)
class Questions:
    data: str
    samples: int = 512


@dataclasses.dataclass(frozen=True)
class Sample:
    """A method with every kind of option."""

    scale: float | list[float] | dict[str, float] = 1.0
    rule: Literal["truncate", "star"] = "truncate"
    calibration: Questions | None = None
    name: ClassVar[str] = "sample"
    needs: ClassVar[frozenset[str]] = frozenset({"donor_base", "vlm_base"})
    default_modules: ClassVar[tuple[str, ...]] = ("all",)


def raw(**changes: Any) -> dict[str, Any]:
    trio = {"vlm": "v", "donor": "d", "donor_base": "b", "vlm_base": "w"}
    return {**trio, "method": {"name": "sample", "calibration": {"data": "q.jsonl"}}, **changes}
