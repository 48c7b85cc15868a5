"""Checkpoints on the Hugging Face hub: `organisation/name` or `organisation/name@revision`.

`fetch` downloads what a merge needs (weights in safetensors, configs, tokenizer, processor, remote code) into
huggingface_hub's cache. `remote_headers` reads the headers alone, by range requests of some kilobytes per shard: enough
to align and to plan. huggingface_hub is imported only when a hub id is used.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TypeVar

from vlmgraft.errors import CheckpointError

WEIGHTS = ("*.safetensors",)
SMALL = ("*.json", "*.txt", "*.jinja", "*.model", "*.py", "*.tiktoken")
TEMPLATES = "additional_chat_templates/*.jinja"
SKIPPED = ("*/*", "consolidated*", "optimizer*", "training_args*")
"""Other subfolders (other formats of the same weights), duplicate weights, training state: not downloaded."""

BUSY = (429, 500, 502, 503, 504)
PAUSES = (1.0, 4.0)
"""Seconds before the first and the second retry of a request."""
T = TypeVar("T")
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+|[\w.-]+")


class UnreachableError(CheckpointError):
    """The hub does not answer; the model may be in the cache."""


class NoSafetensorsError(CheckpointError):
    """The model on the hub has no weights in a supported format; it may be an adapter."""


def split_id(source: str) -> tuple[str, str | None]:
    """("organisation/name", revision or None) of a hub id.

    Raises:
        CheckpointError: neither an existing folder nor the form of a hub id.
    """
    name, _, revision = source.partition("@")
    if not _HUB_ID.fullmatch(name) or len(name) > 200:
        raise CheckpointError(
            f"{source}: no such folder, and not a hub id (organisation/name or organisation/name@revision)"
        )
    return name, revision or None


def fetch(source: str, *, headers_only: bool = False) -> Path:
    """Download a model from the hub and return its local folder; cached files are not downloaded again.

    Args:
        headers_only: leave the weights out (configs, index and tokenizer only); `remote_headers` reads their headers.
    Raises:
        CheckpointError: not on the hub, gated, offline, or without safetensors.
    """
    with explained(source):
        path = retried(lambda: _snapshot(source, [*SMALL, *(() if headers_only else WEIGHTS)]))
        retried(lambda: _snapshot(source, [TEMPLATES], skipped=()))
    if not headers_only and not any(path.glob("*.safetensors")):
        raise CheckpointError(_no_safetensors(source))
    return path


def small_file(source: str, file: str) -> Path | None:
    """Download one small file of a model on the hub; None if the model lacks it or the hub cannot be reached."""
    name, revision = split_id(source)
    with explained(source):
        from huggingface_hub import errors, hf_hub_download

        try:
            return Path(retried(lambda: hf_hub_download(name, file, revision=revision)))
        except errors.EntryNotFoundError:
            return None


def check_access(sources: Iterable[object]) -> None:
    """Check access to every hub model that is not in the cache, before the first one is downloaded.

    Takes a request of a few bytes per model. Raises CheckpointError for a model that is missing, gated or private.
    """
    for source in dict.fromkeys(str(source) for source in sources if source is not None and is_hub_id(source)):
        name, revision = split_id(source)
        with explained(source):
            from huggingface_hub import constants, get_hf_file_metadata, hf_hub_url, try_to_load_from_cache

            if constants.HF_HUB_OFFLINE or isinstance(
                try_to_load_from_cache(name, "config.json", revision=revision), str
            ):
                continue
            url = hf_hub_url(name, "config.json", revision=revision)
            retried(partial(get_hf_file_metadata, url))


def cached_folder(source: str) -> Path | None:
    """The cache folder of a model whose weights were all downloaded, or None."""
    from huggingface_hub import errors

    try:
        folder = _snapshot(source, [*SMALL, *WEIGHTS], local_files_only=True)
    except (OSError, errors.HFValidationError):
        return None
    return folder if any(folder.glob("*.safetensors")) else None


def _snapshot(
    source: str, patterns: list[str], local_files_only: bool = False, skipped: Iterable[str] = SKIPPED
) -> Path:
    from huggingface_hub import snapshot_download

    name, revision = split_id(source)
    folder = snapshot_download(
        name,
        revision=revision,
        allow_patterns=patterns,
        ignore_patterns=list(skipped),
        local_files_only=local_files_only,
    )
    return Path(str(folder))


def retried(request: Callable[[], T]) -> T:
    """The request's result; retried if the hub was busy or the connection broke."""
    from huggingface_hub import errors

    for pause in PAUSES:
        try:
            return request()
        except (OSError, *errors.HfHubHTTPError.__bases__) as error:
            if not is_passing(error):
                raise
            time.sleep(pause)
    return request()


def is_passing(error: Exception) -> bool:
    """Whether a failed request is worth a retry: the hub was busy (429, 5xx), or did not answer."""
    from huggingface_hub import errors

    if isinstance(error, errors.OfflineModeIsEnabled | errors.LocalEntryNotFoundError):
        return False
    response = getattr(error, "response", None)
    return response is None or response.status_code in BUSY


@contextmanager
def explained(source: str) -> Iterator[None]:
    """Turn huggingface_hub's errors into `CheckpointError` with the remedy."""
    from huggingface_hub import errors

    try:
        yield
    except errors.GatedRepoError:
        raise CheckpointError(f"{source}: gated; accept its terms on the hub and log in with `hf auth login`") from None
    except errors.RevisionNotFoundError:
        raise CheckpointError(f"{source}: the model exists, this revision does not") from None
    except errors.RepositoryNotFoundError:
        raise CheckpointError(
            f"{source}: no such folder, and no such model on the hub: it does not exist, or is private; for a private "
            "one log in with `hf auth login`"
        ) from None
    except errors.NotASafetensorsRepoError:
        raise NoSafetensorsError(_no_safetensors(source)) from None
    except errors.SafetensorsParsingError as error:
        raise CheckpointError(f"{source}: the header of its weights is damaged ({error}); tell its authors") from None
    except errors.HFValidationError as error:
        raise CheckpointError(f"{source}: no such folder, and not a hub id ({error})") from None
    except (OSError, *errors.HfHubHTTPError.__bases__) as error:  # the base error of either HTTP client
        first = next(filter(None, str(error).splitlines()), type(error).__name__)
        if getattr(getattr(error, "response", None), "status_code", None) in (401, 403):
            raise CheckpointError(
                f"{source}: the hub refuses your login ({first}); log in again with `hf auth login`, by a token that "
                "may read this model"
            ) from None
        raise UnreachableError(
            f"{source}: no such folder, and it cannot be downloaded ({first}); give a folder that exists"
        ) from None


def _no_safetensors(source: str) -> str:
    return (
        f"{source}: has no safetensors; pickled .bin weights are not read. Download it with "
        f"`hf download {source.partition('@')[0]} --local-dir FOLDER` and give FOLDER: "
        "the command that converts it with the model's own class is named then"
    )


def is_hub_id(source: object) -> bool:
    """Whether a source that is not a local folder has the form of a hub id."""
    return not Path(str(source)).exists() and _HUB_ID.fullmatch(str(source).partition("@")[0]) is not None
