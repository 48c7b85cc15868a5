"""What is no lie: folders of the hub's cache, whose every file is a link, and weights that lie elsewhere."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from places import Place, merge

from vlmgraft.export.card import side_files


def cached(folder: Path, source: Path) -> Path:
    """The folder of a revision in the hub's cache, as huggingface_hub lays it out."""
    (folder / "blobs").mkdir(parents=True)
    snapshot = folder / "snapshots" / "0123abcd"
    snapshot.mkdir(parents=True)
    for file in source.iterdir():
        blob = hashlib.sha256(file.name.encode()).hexdigest()
        shutil.copy(file, folder / "blobs" / blob)
        (snapshot / file.name).symlink_to(Path("..", "..", "blobs", blob))
    return snapshot


def test_a_folder_of_the_hubs_cache_is_merged(trio: Path, tmp_path: Path, vlmgraft: Callable[..., Any]) -> None:
    place = Place(tmp_path, trio)
    snapshot = cached(tmp_path / "hub" / "models--a--b", trio / "vlm")
    ran = vlmgraft(*merge(place, place.recipe(vlm=str(snapshot))))
    assert ran.code == 0, ran.err
    copied = [tmp_path / "out" / file.name for file in side_files(snapshot)]
    assert len(copied) >= 3 and all(file.is_file() and not file.is_symlink() for file in copied)


def test_weights_may_be_links(trio: Path, tmp_path: Path, vlmgraft: Callable[..., Any]) -> None:
    place = Place(tmp_path, trio)
    (place.own("donor") / "model.safetensors").symlink_to(trio / "donor" / "model.safetensors")
    assert vlmgraft(*merge(place)).code == 0
