"""What a report needs of the files in run folders: pydantic refuses rows that lack it, other fields are passed by."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, Field, model_validator

from vlmgraft.alignment.differences import Difference
from vlmgraft.evaluation.intervals import Estimate

Count = Annotated[int, Field(ge=0, lt=1 << 63)]


class _Scored(BaseModel):
    reasoning: Estimate
    perception: Estimate


class PointRow(_Scored):
    """Of sweep.jsonl and results.jsonl."""

    method: str
    setting: str
    order: float
    kl: float | None = None
    drawn: bool = True
    chosen_on: str | None = None


class _Dropped(BaseModel):
    """Of choose.jsonl: a rule that was dropped before the test."""

    method: str
    reasoning: None = None


Contender = PointRow | _Dropped
"""Of choose.jsonl."""


class _Intact(_Scored):
    """Of knockout.jsonl: a model as it is."""

    model: Literal["VLM", "merged", "model"]
    mode: Literal["intact"]


class _KnockedOut(_Scored):
    """Of knockout.jsonl: a model with a block of a layer changed."""

    model: Literal["VLM", "merged", "model"]
    mode: Literal["constant", "zero", "mean", "restore", "only"]
    layer: Count
    part: str
    against: str
    reasoning_change: Estimate
    perception_change: Estimate


Cell = Annotated[_Intact | _KnockedOut, Field(discriminator="mode")]
"""Of knockout.jsonl."""


class Band(_Scored):
    """Of ranks.jsonl."""

    by: Literal["rank", "energy"]
    of: Count
    band: Count | None
    scale: float
    energy: float
    injected: float
    kl: float | None = None


class DistanceRow(BaseModel):
    """Of distances.jsonl."""

    layer: Count | None
    group: str
    weight_norm: float
    donor_norm: float
    vlm_norm: float
    ratio: float
    vlm_ratio: float
    cosine: float
    unchanged: float


class SpectrumRow(BaseModel):
    """Of spectra.jsonl."""

    name: str
    layer: Count | None
    group: str
    shape: tuple[Annotated[Count, Field(gt=0)], Annotated[Count, Field(gt=0)]]
    norm: float
    effective_rank: float
    stable_rank: float
    first: dict[str, float]
    shown: tuple[tuple[Count, float], ...]

    @model_validator(mode="after")
    def _complete(self) -> SpectrumRow:
        if not {"1", "8", "64"} <= self.first.keys():
            raise ValueError("the shares of the first 1, 8 and 64 directions are needed")
        if self.shown and not (self.norm > 0 and self.shown[0][1] > 0):
            raise ValueError("norm and largest singular value must be above 0")
        return self


class _Extent(BaseModel):
    median_ratio: float


class _Base(BaseModel):
    base: str
    donor_ratio: float
    vlm_ratio: float


class InspectionFile(BaseModel):
    """inspection.json."""

    extent: _Extent
    base: str
    bases: tuple[_Base, ...]
    differences: tuple[Difference, ...]


class _Tensor(BaseModel):
    name: str
    verdict: str
    reason: str
    added: float = 0.0
    task_vector: float | None = None


class MergeReceipt(BaseModel):
    """receipt.json of a merge."""

    method: str
    tensors: tuple[_Tensor, ...]
    versions: dict[str, str]
    seconds: float
    peak_memory: float
    notes: tuple[str, ...] = ()


class GateSettings(BaseModel):
    """gates.json."""

    scale: float
    steps: Count | None = None
    inject: str | None = None
    inject_weight: float | None = None
    energy: float | None = None


class Step(BaseModel):
    """Of training.jsonl of gates."""

    step: Count
    loss: float | None = None
    kl: float | None = None
    inject: float | None = None
    energy: float | None = None
    inject_weight: float | None = None


class _Answer(BaseModel):
    model: str
    said: str
    right: bool


class Answered(BaseModel):
    """Of answers.jsonl: one question, several models."""

    task: str
    kind: str
    question: str
    expected: str
    image: str | None = None
    answers: tuple[_Answer, ...]


class Averages(BaseModel):
    """summary.json of an evaluation."""

    averages: dict[str, Estimate]
