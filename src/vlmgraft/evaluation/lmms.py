"""The bridge to lmms-eval: run that harness on a folder, and read its sample logs as our records.

The harness should have its own environment (it installs 7 GB), whose Python VLMGRAFT_LMMS_PYTHON names; without it, the
harness is run from this environment. VLMGRAFT_LMMS_ARGS is appended to the harness's command line, where it can add
options or override ours (`--model`, `--model_args`, `--include_path`).
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from pydantic import AliasChoices, BaseModel, Field

from vlmgraft.checkpoint.files import load_json
from vlmgraft.errors import DataError, InputError, VlmgraftError
from vlmgraft.evaluation.answers import read_final, repeats
from vlmgraft.evaluation.answers.text import storable
from vlmgraft.evaluation.answers.values import yes_or_no
from vlmgraft.evaluation.items import Item
from vlmgraft.evaluation.presets import PRESETS
from vlmgraft.evaluation.records import Record, fault_record, record_of

PYTHON = "VLMGRAFT_LMMS_PYTHON"
INSTALL = (
    "lmms-eval is not installed. Give it an environment of its own, `python -m venv lmms && lmms/bin/pip install "
    f"lmms-eval decord`, and name its Python: `export {PYTHON}=lmms/bin/python`"
)
ARGUMENTS = "VLMGRAFT_LMMS_ARGS"
PASSED = ("limit", "batch_size", "seed", "judge", "judge_model")
"""Options of `evaluate` that apply to lmms-eval: passed to it, or used on its records."""
_MODELS = {
    "gemma3": "gemma3",
    "idefics2": "idefics2",
    "internvl": "internvl_hf",
    "llava": "llava_hf",
    "llava_next": "llava_hf",
    "qwen2_5_vl": "qwen2_5_vl",
    "qwen2_vl": "qwen2_vl",
    "qwen3_vl": "qwen3_vl",
}
"""model_type → the name of the model in lmms-eval 0.7.3."""
_LOGGED = ("doc_id", "doc", "doc_hash", "target", "input", "arguments", "input_media")
_NOT_METRICS = frozenset((*_LOGGED, "resps", "filtered_resps", "token_counts", "submission"))
_SCORES = ("score", "acc", "acc_score", "accuracy", "correct", "exact_match")
_DATED = re.compile(r"^\d+_\d+_samples_|^samples_")


def refuse_unpassed(options: Any) -> None:
    """Raise InputError for a field that lmms-eval would not get: its tasks have prompts and limits of their own."""
    ignored = [
        field.name
        for field in fields(options)
        if field.name not in PASSED and getattr(options, field.name) != field.default
    ]
    if ignored:
        raise InputError(
            f"--data lmms:… does not take {', '.join(ignored)}; leave them out, or pass lmms-eval's own options in "
            f"{ARGUMENTS}"
        )


def run_lmms(
    python: str,
    model: str | Path,
    tasks: str,
    out: Path,
    *,
    limit: int | None = None,
    batch_size: int = 1,
    seed: int = 0,
) -> list[Record]:
    """Run the harness on `tasks` (separated by commas) and read its logs from `out/lmms`; existing logs are reused.

    python: see `harness_python`. Raises VlmgraftError if the harness fails; its log says why.
    """
    logs = out / "lmms"
    if not sample_files(logs):
        logs.mkdir(parents=True, exist_ok=True)
        command = harness_command(python, model, tasks, logs, limit=limit, batch_size=batch_size, seed=seed)
        with (logs / "harness.log").open("w", encoding="utf-8") as log:
            ended = subprocess.run(command, stdout=log, stderr=subprocess.STDOUT, check=False)
        if ended.returncode or not sample_files(logs):
            tail = (logs / "harness.log").read_text(encoding="utf-8", errors="replace").strip().splitlines()[-1:]
            raise VlmgraftError(
                f"lmms-eval ended with {ended.returncode}: {' '.join(tail)[:300]}; see {logs}/harness.log"
            )
    return [record for file in sample_files(logs) for record in read_samples(file)]


def harness_python() -> str:
    """The Python that can run lmms-eval; raises InputError saying how to install it."""
    named = os.environ.get(PYTHON)
    if named:
        if not Path(named).exists():
            raise InputError(f"{PYTHON}={named}: no such file. {INSTALL}")
        return named
    if importlib.util.find_spec("lmms_eval") is None:
        raise InputError(INSTALL)
    return sys.executable


def harness_command(
    python: str, model: str | Path, tasks: str, logs: Path, *, limit: int | None, batch_size: int, seed: int
) -> list[str]:
    """The command line of the harness, with samples logged."""
    device = "" if _has_gpu() else ",device=cpu,device_map=cpu"
    command = [python, "-m", "lmms_eval", "--model", _harness_model(model)]
    command += ["--model_args", f"pretrained={model}{device}", "--tasks", tasks, "--batch_size", str(batch_size)]
    command += ["--seed", str(seed), "--log_samples", "--output_path", str(logs)]
    command += ["--limit", str(limit)] if limit else []
    try:
        return command + shlex.split(os.environ.get(ARGUMENTS, ""))
    except ValueError as error:
        raise InputError(f"{ARGUMENTS}: cannot be split into words ({error}); close its quotes") from None


def _harness_model(model: str | Path) -> str:
    """The harness's model name for a folder's `model_type`; its generic "huggingface" for unknown types."""
    config = Path(model) / "config.json"
    kind = load_json(config).get("model_type") if config.is_file() else None
    return _MODELS.get(str(kind), "huggingface")


def _has_gpu() -> bool:
    import torch

    return bool(torch.cuda.is_available())


def sample_files(logs: Path) -> list[Path]:
    """The newest sample log of every task below a folder, sorted by task name."""
    newest: dict[str, Path] = {}
    for file in sorted(logs.rglob("*samples_*.jsonl"), key=lambda file: file.name):
        newest[task_of(file)] = file
    return [newest[task] for task in sorted(newest)]


def task_of(file: Path) -> str:
    """The task name in a sample log's file name."""
    return _DATED.sub("", file.stem)


class _Sample(BaseModel):
    """What every row of a sample log has; tasks add their measures."""

    doc_id: int | str
    answers: Any = Field(validation_alias=AliasChoices("resps", "filtered_resps"))


def read_samples(file: Path) -> list[Record]:
    """The records of one sample log; raises DataError naming file and line."""
    records = []
    for number, line in enumerate(file.read_text(encoding="utf-8", errors="replace").split("\n"), start=1):
        if not line:
            continue
        try:
            row = json.loads(line)
            _Sample.model_validate(row)
        except (ValueError, RecursionError) as error:
            raise DataError(
                f"{file}, line {number}: no sample of lmms-eval ({error!s:.200}); remove the log to have it made again"
            ) from error
        records.append(translate(row, task_of(file)))
    return records


def translate(row: dict[str, Any], task: str) -> Record:
    """Convert one sample to a record. The score is the harness's first per-item metric in [0, 1]; without one (a
    judge's text, a submission), the output is scored here against the harness's target.

    Fields that the harness does not log stay unknown: the prompt is the text before the chat template, `cut` is false.
    """
    output = _text(row["resps"] if "resps" in row else row["filtered_resps"])
    name, score = _score(row)
    preset = next((preset for known, preset in PRESETS.items() if task.startswith(known)), None)
    item = Item(
        id=str(row["doc_id"]),
        question=_text(row.get("input", "")),
        answers=(str(row["target"]),) if str(row.get("target") or "").strip() else (),
        task=task,
        kind=preset.kind if preset else "other",
        metric=preset.metric if preset and preset.metric != "vqa" else "auto",
    )
    tokens = _tokens(row.get("token_counts"))
    if score is None:
        return record_of(item, item.question, output, tokens=tokens, prompt_tokens=0, cut=False)
    answer, how = read_final(output)
    stance = yes_or_no(answer) if item.metric in ("yes_no", "pope") else None
    blank = fault_record(item, "", failed=True)
    fields = {"output": output, "how": how, "score": score, "tokens": tokens, "found": bool(answer)}
    fields |= {"answer": answer if stance is None else "yes" if stance else "no", "repeated": repeats(output)}
    metric = item.metric if item.metric in ("yes_no", "pope") else f"lmms_eval {name}"
    return Record(**{**vars(blank), **fields, "state": "scored", "metric": metric})


def _score(row: dict[str, Any]) -> tuple[str, float | None]:
    for name, value in row.items():
        if name in _NOT_METRICS:
            continue
        number = value
        if isinstance(value, dict):
            number = next((value[key] for key in _SCORES if key in value), None)
        if isinstance(number, bool | int | float) and 0 <= number <= 1:
            return name, float(number)
    return "", None


def _text(value: Any) -> str:
    while isinstance(value, list | tuple):
        value = value[0] if value else ""
    return storable(str(value))


def _tokens(counts: Any) -> int:
    first: Any = counts[0] if isinstance(counts, Sequence) and counts else counts
    count = first.get("output_tokens") if isinstance(first, dict) else None
    return count if isinstance(count, int) else 0
