"""Opening pictures that nobody vouched for."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from vlmgraft.data.images import MAX_PIXELS
from vlmgraft.errors import DataError
from vlmgraft.evaluation.images import open_image


def encoded(kind: str = "PNG", mode: str = "RGB") -> bytes:
    buffer = io.BytesIO()
    Image.new(mode, (8, 6), 1 if mode in ("L", "P") else (10, 20, 30, 40)[: len(mode)]).save(buffer, kind)
    return buffer.getvalue()


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM"])
def test_every_source_opens_in_rgb(kind: str, tmp_path: Path) -> None:
    data = encoded(kind)
    (tmp_path / "p").write_bytes(data)
    sources: list[Any] = [data, tmp_path / "p", Image.open(io.BytesIO(data)), lambda: data, lambda: tmp_path / "p"]
    opened = [open_image(source) for source in sources]
    assert {(image.mode, image.size) for image in opened} == {("RGB", (8, 6))}
    assert len({image.tobytes() for image in opened}) == 1


def test_a_picture_is_measured_before_it_is_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    large = Image.new("1", (8000, MAX_PIXELS // 8000 + 1))
    monkeypatch.setattr(Image.Image, "convert", lambda *_: pytest.fail("it was decoded"))
    with pytest.raises(DataError, match=r"the image in the data: enormous, 8000×"):
        open_image(large)


@pytest.mark.parametrize(
    ("source", "message"),
    [(Path("/home/me/set/gone.png"), r"^set/gone\.png: missing"), (b"GIF89a", "corrupt"), (lambda: 3, "got int")],
)
def test_what_cannot_be_shown_is_named_without_saying_where_files_lie(source: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        open_image(source)
