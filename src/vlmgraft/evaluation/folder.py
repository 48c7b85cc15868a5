"""The folder of an evaluation: its settings (run.json), records, summary, and a receipt over all of them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from vlmgraft.checkpoint.digests import RECEIPT, write_receipt
from vlmgraft.errors import OutputError
from vlmgraft.evaluation.judge import Judge
from vlmgraft.evaluation.records import RECORDS, Record, load_records
from vlmgraft.evaluation.summary import Summary, summarise, summary_table
from vlmgraft.storage.files import sweep_files
from vlmgraft.storage.jsonl import drop_cut_line, read_json, write_json, write_rows, write_text
from vlmgraft.storage.outputs import refuse_output
from vlmgraft.storage.portable import portable
from vlmgraft.storage.publish import Publication

RUN, SUMMARY, TABLE = "run.json", "summary.json", "summary.md"
UNCOMPARED = ("batch_size", "device", "steer")
"""Options that a resumed run may change. The steering vector is compared by the digest of its file."""


@contextmanager
def opened(out: Path, settings: dict[str, Any], resume: bool, model: str | Path) -> Iterator[Path]:
    """The working folder: hidden next to `out` until the run is done, or `out` itself if that is finished already.

    Raises OutputError if `out` exists or, with `resume`, was begun with other settings. Batch size and device may
    change, so that a run that ran out of memory can be resumed elsewhere. The files of an interrupted run are kept.
    """
    publication = Publication(out, "evaluation", keep_refused=True)
    hidden = publication.folder
    if resume and out.is_dir():
        if (out / SUMMARY).is_file():
            _check_settings(out, settings)
            yield out
            return
        if any(out.iterdir()):
            raise OutputError(
                f"{out}: holds no finished evaluation, so there is nothing to resume; choose another folder"
            )
        else:
            out.rmdir()
    refuse_output(out, [model])
    if not _only_settings(hidden):
        if not resume:
            raise OutputError(f"{hidden}: is an unfinished evaluation; go on with --resume, or remove it")
        _check_settings(hidden, settings)
    with publication:
        drop_cut_line(hidden / RECORDS)
        sweep_files(hidden)
        try:
            yield hidden
        except BaseException:
            if _only_settings(hidden):
                shutil.rmtree(hidden, ignore_errors=True)
            raise


def _only_settings(hidden: Path) -> bool:
    """Whether the hidden folder is absent, or holds nothing that a run could go on from."""
    return not hidden.is_dir() or {path.name for path in hidden.iterdir()} <= {RUN}


def _check_settings(folder: Path, settings: dict[str, Any]) -> None:
    """Raise OutputError if a folder was begun with other settings."""
    before, now = (_kept(run_settings) for run_settings in (read_json(folder / RUN), settings))
    changed = [name for name in now if before.get(name) != now[name]]
    if changed:
        old, new = ({name: side.get(name) for name in changed} for side in (before, now))
        raise OutputError(
            f"{folder / RUN}: was begun with other settings, {old}, not {new}; use them, or another folder"
        )


def _kept(settings: dict[str, Any]) -> dict[str, Any]:
    """The settings that a resumed run must share, as JSON values. Paths are reduced to names, because the digests of
    weights and items identify their contents."""
    asking = settings.get("asking")
    if isinstance(asking, dict):
        asking = {name: value for name, value in asking.items() if name not in UNCOMPARED}
    names = portable(json.loads(json.dumps({**settings, "asking": asking})), Path())
    model, data = str(names.get("model")), names.get("data")
    return {**names, "model": _name(model), "data": [_name(str(each)) for each in data] if data else data}


def _name(source: str) -> str:
    return f"./{Path(source).name}" if source.startswith(("./", "../")) else source


def start(out: Path, settings: dict[str, Any]) -> None:
    """Write the settings of the run, without absolute paths."""
    write_json(out / RUN, portable(settings, out))


def stored_records(out: Path) -> list[Record]:
    """The records already in the folder, if any."""
    return load_records(out / RECORDS) if (out / RECORDS).is_file() else []


def finish(out: Path, records: Sequence[Record], duplicates: int, seed: int, judge: Judge | None = None) -> Summary:
    """Write the records in order, their summary and the receipt, unless the folder is already finished."""
    judged = judge.verdicts(records) if judge else None
    summary = summarise(records, duplicates=duplicates, seed=seed, judged=judged)
    if (out / RECEIPT).is_file() and (out / SUMMARY).is_file():
        return summary
    write_rows(out / RECORDS, records)
    write_text(out / TABLE, summary_table(summary))
    write_json(out / SUMMARY, asdict(summary))
    write_receipt(out, {})
    return summary
