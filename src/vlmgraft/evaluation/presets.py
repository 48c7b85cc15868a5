"""The published column layouts of benchmarks, as data: which columns to read, how to ask, how to score.

No benchmark data is included. A preset reads the data set on the hub (`source`, `split`) or a local copy with the same
layout. Layouts as published in 2026, checked against the readers of lmms-eval 0.7.3.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from vlmgraft.evaluation.items import GroupScore, Kind

LETTER = "Answer with the letter of the correct option."
REASONED = "Think step by step, then give the final answer as \\boxed{answer}."
SHORT = "Answer the question with a single word or phrase."
JSON = (
    'Reply with a JSON object of two keys: "solution", the steps in words, and "short answer", the result alone: the '
    "letter of the correct choice, or a number with three decimals."
)
YES_NO = "Answer with yes or no."
UNANSWERABLE = 'When the information is insufficient, answer "unanswerable". ' + SHORT


@dataclass(frozen=True)
class Columns:
    """Column names of every field; of several names, the first non-empty column of a row is used.

    images: a name that ends in "*" matches all columns with that prefix. id: all columns, joined by "/"; the row's
    index if it has none of them. answers: one value, a list of values, or a list of objects with "answer". group: all
    columns, joined by "/"; a name that ends in "|" ends one group's name, and the next name begins another's.
    """

    question: tuple[str, ...] = ("question",)
    images: tuple[str, ...] = ("image", "images")
    answers: tuple[str, ...] = ("answer", "answers")
    choices: tuple[str, ...] = ("choices", "options")
    id: tuple[str, ...] = ("id",)
    category: tuple[str, ...] = ("category",)
    kind: tuple[str, ...] = ("kind",)
    task: tuple[str, ...] = ()
    precision: tuple[str, ...] = ()
    group: tuple[str, ...] = ()
    part: tuple[str, ...] = ()


@dataclass(frozen=True)
class Preset:
    """One benchmark; `suffix` is written below every question."""

    source: str
    split: str
    kind: Kind
    columns: Columns = field(default_factory=Columns)
    config: str | None = None
    metric: str = "auto"
    suffix: str = REASONED
    pairing: GroupScore = ""
    max_new_tokens: int = 2048


_OPTIONS_INSIDE: tuple[str, ...] = ()
"""No column: the question's text lists the choices."""
_SET = ("category", "subcategory", "set_id")
"""The columns that identify one set of figures and questions in HallusionBench."""

PRESETS: Mapping[str, Preset] = {
    "mathvista": Preset(
        "AI4Math/MathVista",
        "testmini",
        "reasoning",
        Columns(images=("decoded_image", "image"), id=("pid",), category=("question_type",), precision=("precision",)),
        metric="mathvista",
    ),
    "mathverse": Preset(
        "AI4Math/MathVerse",
        "testmini",
        "reasoning",
        Columns(
            question=("query_cot", "question"),
            id=("sample_index",),
            category=("problem_version",),
            choices=_OPTIONS_INSIDE,
        ),
        suffix="",
        config="testmini",
    ),
    "mathvision": Preset(
        "MathLLMs/MathVision",
        "testmini",
        "reasoning",
        Columns(images=("decoded_image", "image"), category=("subject",)),
        metric="mathvision",
    ),
    "wemath": Preset(
        "We-Math/We-Math",
        "testmini",
        "reasoning",
        Columns(
            images=("image_path",),
            choices=("option",),
            id=("ID", "key"),
            category=("key",),
            group=("ID",),
            part=("key",),
        ),
        pairing="four_way",
    ),
    "logicvista": Preset(
        "lscpku/LogicVista",
        "test",
        "reasoning",
        Columns(images=("image", "imagepath"), category=("skill",), choices=_OPTIONS_INSIDE, id=("id", "name")),
    ),
    "mmmu": Preset(
        "lmms-lab/MMMU", "validation", "reasoning", Columns(images=("image_*",), category=("subfield",)), metric="mmmu"
    ),
    "mmstar": Preset(
        "Lin-Chen/MMStar", "val", "reasoning", Columns(id=("index",), choices=_OPTIONS_INSIDE), suffix=LETTER
    ),
    "dynamath": Preset(
        "DynaMath/DynaMath_Sample",
        "all",
        "reasoning",
        Columns(
            images=("decoded_image", "image"),
            answers=("ground_truth",),
            id=("id", "variant"),
            choices=_OPTIONS_INSIDE,
            category=("subject",),
            group=("id",),
            part=("variant",),
        ),
        pairing="worst",
        metric="dynamath",
        suffix=JSON,
    ),
    "pope": Preset(
        "lmms-lab/POPE",
        "test",
        "perception",
        Columns(id=("category", "question_id")),
        metric="pope",
        suffix=YES_NO,
        max_new_tokens=64,
    ),
    "vizwiz": Preset(
        "lmms-lab/VizWiz-VQA",
        "val",
        "perception",
        Columns(answers=("answers",), id=("question_id", "image_id"), category=("category", "answer_type")),
        metric="vqa",
        suffix=UNANSWERABLE,
        max_new_tokens=64,
    ),
    "textvqa": Preset(
        "lmms-lab/textvqa",
        "validation",
        "perception",
        Columns(answers=("answers",), id=("question_id",), category=()),
        metric="vqa",
        suffix=SHORT,
        max_new_tokens=64,
    ),
    "chartqa": Preset(
        "lmms-lab/ChartQA",
        "test",
        "perception",
        Columns(question=("question", "query"), answers=("answer", "label"), category=("type", "human_or_machine")),
        metric="relaxed",
        suffix=SHORT,
        max_new_tokens=64,
    ),
    "ocrbench": Preset(
        "echo840/OCRBench",
        "test",
        "perception",
        Columns(category=("question_type",), id=()),
        metric="contains",
        suffix="",
        max_new_tokens=256,
    ),
    "realworldqa": Preset(
        "xai-org/RealworldQA",
        "test",
        "perception",
        Columns(choices=_OPTIONS_INSIDE, category=()),
        suffix="",
        max_new_tokens=256,
    ),
    "hallusionbench": Preset(
        "lmms-lab/HallusionBench",
        "image",
        "perception",
        Columns(
            answers=("gt_answer",),
            id=(*_SET, "figure_id", "question_id"),
            category=("subcategory",),
            group=(*_SET, "question_id|", *_SET, "figure_id"),
        ),
        metric="yes_no",
        suffix=YES_NO,
        pairing="pairs",
        max_new_tokens=64,
    ),
}
