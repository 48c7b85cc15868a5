"""Opening images that nobody vouched for: missing, corrupt or enormous ones become a reason, not a crash."""

from __future__ import annotations

from pathlib import Path

from PIL import Image

from vlmgraft.data.images import MAX_PIXELS, open_picture, upright_rgb
from vlmgraft.errors import DataError
from vlmgraft.evaluation.items import ImageSource


def open_image(source: ImageSource) -> Image.Image:
    """The image in RGB; raises DataError saying why it cannot be shown. Its size is checked before it is decoded."""
    if callable(source) and not isinstance(source, Image.Image):
        source = source()
    name = "/".join(source.parts[-2:]) if isinstance(source, Path) else "the image in the data"  # records are shared
    if isinstance(source, Image.Image):
        if source.width * source.height > MAX_PIXELS:
            raise DataError(f"{name}: enormous, {source.width}×{source.height} pixels; shrink it")
        return upright_rgb(source)
    if not isinstance(source, Path | bytes | bytearray):
        raise DataError(f"an image must be a path, bytes or a picture, got {type(source).__name__}")
    return open_picture(source, name)
