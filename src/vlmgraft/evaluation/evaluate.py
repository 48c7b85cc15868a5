"""The public functions `evaluate` and `compare`: a model and data in, records and scores out.

A folder of an evaluation holds `run.json` (model, data and settings), `records.jsonl` (one row per item, see
`evaluation/records.py`), `summary.json` and `summary.md`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlmgraft.checkpoint.digests import folder_digest, range_digest
from vlmgraft.errors import CheckpointError, DataError, InputError
from vlmgraft.evaluation import folder
from vlmgraft.evaluation.items import Suite, merge_suites
from vlmgraft.evaluation.judge import Judge
from vlmgraft.evaluation.lmms import refuse_unpassed
from vlmgraft.evaluation.paired import Paired, compare_records, comparison_table
from vlmgraft.evaluation.readers import distinct_tasks, load_suite, short_names
from vlmgraft.evaluation.records import RECORDS, Record, load_records
from vlmgraft.evaluation.summary import Summary
from vlmgraft.storage.files import make_folder
from vlmgraft.storage.jsonl import write_json, write_text
from vlmgraft.storage.locks import at_work
from vlmgraft.storage.outputs import refuse_output

if TYPE_CHECKING:
    from vlmgraft.storage.progress import Progress

Data = str | Path | Suite
COMPARISON = ("comparison.json", "comparison.md", "first", "second")
"""Names of the files and folders that `compare` writes."""


@dataclass(frozen=True)
class Asking:
    """How a model is asked.

    max_new_tokens: None is the data's default, at most half of the model's context. suffix: text below every question;
    None is the data's own. temperature 0 is greedy. device: None is the first GPU, or the CPU. limit: number of rows
    per source, from the first. columns, split, config: see `evaluation.readers.load_suite`. circular: ask every
    rotation of lettered choices. steer: a file that `vlmgraft steer` wrote, applied at `steer_strength` (None: its
    own). judge: address of an OpenAI-compatible endpoint whose `judge_model` judges answers in addition to the rules.
    """

    batch_size: int = 32
    max_new_tokens: int | None = None
    suffix: str | None = None
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    engine: str = "transformers"
    device: str | None = None
    dtype: str = "auto"
    limit: int | None = None
    columns: Mapping[str, str] | None = None
    split: str | None = None
    config: str | None = None
    circular: bool = False
    steer: str | None = None
    steer_strength: float | None = None
    judge: str | None = None
    judge_model: str = ""

    def __post_init__(self) -> None:
        if self.seed < 0:
            raise InputError(f"seed must be 0 or more, got {self.seed}")
        if self.steer_strength is not None and self.steer is None:
            raise InputError("steer_strength: there is no steering vector; give one as steer")
        if self.steer is not None and self.engine != "transformers":
            raise InputError(f"steer: hidden states are changed in transformers only, not in {self.engine}")
        if bool(self.judge) != bool(self.judge_model):
            raise InputError("a judge needs both its address and its model: give judge and judge_model")
        if self.judge and "@" in self.judge.partition("://")[2].partition("/")[0]:  # run.json keeps the address
            raise InputError("judge: the address holds a name or password; give the key as OPENAI_API_KEY instead")


def evaluate(
    model: str | Path,
    data: Data | Sequence[Data],
    out: str | Path,
    *,
    resume: bool = False,
    progress: Progress | None = None,
    **asking: Any,
) -> Summary:
    """Ask a model everything in `data` and write the folder `out`.

    Args:
        model: folder or hub id of a VLM, or of a text model for questions without images.
        data: a question file, a data set's id, a preset's name (`mathvista`, `pope`, …) or PRESET:SOURCE, a
            registered source ("lab" or "lab:SEED"), "lmms:TASK,TASK" (runs lmms-eval), a `Suite`; or several of them.
        resume: continue an interrupted run in `out`; answered questions are not asked again.
        asking: the fields of `Asking`.
    Returns:
        The summary, as `summary.json` holds it.
    Raises:
        DataError: the data cannot be read. OutputError: `out` exists, or was begun with other settings.
        CheckpointError: the model cannot be loaded. VlmgraftError: no question at all could be asked.
    """
    out, options = Path(out), _asking(asking)
    sources = [data] if isinstance(data, str | Path | Suite) else list(data)
    harness = [str(source)[len("lmms:") :] for source in sources if str(source).startswith("lmms:")]
    if any(not tasks.strip(", ") for tasks in harness):
        raise InputError("--data lmms: names no task; write lmms:mathvista_testmini,pope")
    if harness and len(harness) < len(sources):
        raise InputError("--data lmms:… cannot be mixed with other data; run it in a folder of its own, then `compare`")
    if harness:
        refuse_unpassed(options)
    suite = None if harness else _suite(sources, options)
    identity = {
        "model": str(model),
        "weights": folder_digest(model),
        "data": [str(_name(source)) for source in sources],
        "steering": _steering_digest(options),
    }
    settings = identity | {"asking": asdict(options), "items": suite.digest if suite else None}
    lower = "lower batch_size or max_new_tokens"
    with at_work(out, "asking", lower, [model]), folder.opened(out, settings, resume, model) as hidden:
        return _ask_rest(hidden, settings, suite, ",".join(harness), options, model, progress)


def _ask_rest(
    out: Path,
    settings: dict[str, Any],
    suite: Suite | None,
    tasks: str,
    options: Asking,
    model: str | Path,
    progress: Progress | None,
) -> Summary:
    """Ask the items that the folder has no record of, and write records and summary."""
    if suite is None:
        return folder.finish(out, _harness(model, tasks, out, settings, options), 0, options.seed, _judge(options, out))
    known = {item.id: item.key for item in suite.items}
    done = [record for record in folder.stored_records(out) if known.get(record.id) == record.key]
    if len(done) < len(suite.items):
        from vlmgraft.evaluation.ask import ask

        engine = _engine(model, suite, options)
        folder.start(out, settings)
        more: dict[str, Any] = {"log": out / RECORDS, "progress": progress, "seed": options.seed}
        with _steered(engine, options):
            done = ask(engine, suite, batch_size=options.batch_size, done=done, **more)
    order = {item.id: at for at, item in enumerate(suite.items)}
    return folder.finish(
        out, sorted(done, key=lambda record: order[record.id]), suite.duplicates, options.seed, _judge(options, out)
    )


def _steering_digest(options: Asking) -> str | None:
    """A digest of the steering vector's file, if one is requested; raises CheckpointError if it holds no vector."""
    if options.steer is None:
        return None
    from vlmgraft.hf.steering import Steering

    Steering.load(options.steer)
    return range_digest(Path(options.steer), 0, Path(options.steer).stat().st_size)


def _steered(engine: Any, options: Asking) -> AbstractContextManager[None]:
    """A context that applies the requested steering vector, if any, to the engine's model."""
    if options.steer is None:
        return nullcontext()
    from vlmgraft.hf.steering import Steering

    return Steering.load(options.steer).applied(engine.model, options.steer_strength)


def _judge(options: Asking, out: Path) -> Judge | None:
    return Judge(options.judge, options.judge_model, out / "judge.jsonl") if options.judge else None


def compare(
    first: str | Path,
    second: str | Path,
    *,
    data: Data | Sequence[Data] | None = None,
    out: str | Path | None = None,
    resume: bool = False,
    progress: Progress | None = None,
    **asking: Any,
) -> Paired:
    """Two evaluations on the same items: paired differences (second minus first), McNemar's test, averages.

    Args:
        first: a folder that `evaluate` wrote; or, with `data` and `out`, a model, which is evaluated into `out/first`.
        second: the same; evaluated into `out/second`.
        out: where `comparison.json` and `comparison.md` are written; optional for two evaluations.
    Raises:
        DataError: the runs share no scored item, or their items differ. OutputError: `out` is or contains one of them,
            or holds files that are not a comparison's.
    """
    if out is not None:
        refuse_output(Path(out), [first, second], ours=lambda name: name in COMPARISON or name.startswith("."))
    runs = []
    for side, model in (("first", first), ("second", second)):
        if (Path(model) / RECORDS).is_file():
            runs.append(Path(model))
            continue
        if data is None or out is None:
            raise DataError(
                f"{model}: holds no {RECORDS}; give a folder of `vlmgraft evaluate`, or a model with --data and --out"
            )
        target = Path(out) / side
        make_folder(target.parent)
        evaluate(model, data, target, resume=resume, progress=progress, **asking)
        runs.append(target)
    one, other = short_names([Path(first), Path(second)])
    comparison = compare_records(
        load_records(runs[0] / RECORDS), load_records(runs[1] / RECORDS), (one, other), _asking(asking).seed
    )
    if out is not None:
        make_folder(Path(out))
        write_text(Path(out) / "comparison.md", comparison_table(comparison))
        write_json(Path(out) / "comparison.json", asdict(comparison))
    return comparison


def _asking(given: Mapping[str, Any]) -> Asking:
    unknown = set(given) - set(Asking.__dataclass_fields__)
    if unknown:
        raise TypeError(f"unknown option {', '.join(sorted(unknown))}; {', '.join(Asking.__dataclass_fields__)}")
    options = Asking(**given)
    for name, least in (("batch_size", 1), ("max_new_tokens", 1), ("limit", 1), ("temperature", 0)):
        value = getattr(options, name)
        if value is not None and not least <= value < math.inf:
            raise InputError(f"{name} {value}: must be at least {least}, and finite")
    if not 0 < options.top_p <= 1:
        raise InputError(f"top_p {options.top_p}: must be above 0 and at most 1")
    if options.steer_strength is not None and not math.isfinite(options.steer_strength):
        raise InputError(f"steer_strength {options.steer_strength}: must be finite")
    for name, known in (("engine", ("transformers", "vllm")), ("dtype", ("auto", "float32", "bfloat16", "float16"))):
        if getattr(options, name) not in known:
            raise InputError(f"{name} {getattr(options, name)!r}: write {' or '.join(known)}")
    return options


def _suite(sources: Sequence[Data], options: Asking) -> Suite:
    layout: dict[str, Any] = {name: getattr(options, name) for name in ("columns", "split", "config", "limit")}
    layout["turn_options"] = options.circular
    suites = [
        source if isinstance(source, Suite) else load_suite(source, task=task, **layout)
        for source, task in zip(sources, distinct_tasks(sources), strict=True)
    ]
    if options.suffix is not None:
        suites = [replace(suite, suffix=options.suffix) for suite in suites]
    return merge_suites(suites)


def _name(source: Data) -> str:
    return source.name if isinstance(source, Suite) else str(source)


def _engine(model: str | Path, suite: Suite, options: Asking) -> Any:
    import torch

    from vlmgraft.evaluation.engine import Sampling, TransformersEngine, VllmEngine
    from vlmgraft.hf.models import load_processor, load_text_model, load_vlm

    limit = options.max_new_tokens or suite.max_new_tokens
    sampling = Sampling(limit, options.temperature, options.top_p, options.seed)
    processor = load_processor(model)
    if options.engine == "vllm":
        dtype = {} if options.dtype == "auto" else {"dtype": options.dtype}
        return VllmEngine(model, processor, sampling, seed=options.seed, **dtype)
    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"device {device!r}: cannot be used ({str(error)[:120]}); write cpu, or another") from error
    try:
        loaded = load_vlm(model, options.dtype, device)
    except CheckpointError as error:  # it may be a text model; if it is neither, the first error is reported
        try:
            loaded = load_text_model(model, options.dtype, device)
        except CheckpointError:
            raise error from None
    context = getattr(loaded.config.get_text_config(decoder=True), "max_position_embeddings", None)
    if options.max_new_tokens is None and context:
        sampling = replace(sampling, max_new_tokens=min(limit, context // 2))
    return TransformersEngine(loaded, processor, sampling)


def _harness(model: str | Path, tasks: str, out: Path, settings: dict[str, Any], options: Asking) -> list[Record]:
    from vlmgraft.evaluation.lmms import harness_python, run_lmms

    python = harness_python()
    folder.start(out, settings)
    return run_lmms(python, model, tasks, out, limit=options.limit, batch_size=options.batch_size, seed=options.seed)
