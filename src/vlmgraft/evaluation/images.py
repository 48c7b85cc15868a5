"""Opening images that nobody vouched for: missing, corrupt or enormous ones become a reason, not a crash."""

from __future__ import annotations

import io
import struct
import warnings
from pathlib import Path

from PIL import Image

from vlmgraft.errors import DataError
from vlmgraft.evaluation.items import ImageSource

MAX_PIXELS = 89_478_485
"""Pillow's own bound for a decompression bomb: a quarter of a gigabyte of RGB."""


def open_image(source: ImageSource) -> Image.Image:
    """The image in RGB; raises DataError saying why it cannot be shown. Its size is checked before it is decoded."""
    if callable(source) and not isinstance(source, Image.Image):
        source = source()
    name = str(source) if isinstance(source, Path) else "the image in the data"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            image = source if isinstance(source, Image.Image) else Image.open(_stream(source))
            width, height = image.size
            if width * height > MAX_PIXELS:
                raise DataError(f"{name}: enormous, {width}×{height} pixels; at most {MAX_PIXELS:,} are decoded")
            return image.convert("RGB")
    except FileNotFoundError:
        raise DataError(f"{name}: missing") from None
    except Image.DecompressionBombError as error:
        raise DataError(f"{name}: enormous ({error})") from error
    except (OSError, SyntaxError, ValueError, EOFError, struct.error, KeyError, IndexError, MemoryError) as error:
        raise DataError(f"{name}: corrupt ({str(error)[:120]})") from error


def _stream(source: object) -> Path | io.BytesIO:
    if isinstance(source, bytes | bytearray):
        return io.BytesIO(source)
    if isinstance(source, Path):
        return source
    raise DataError(f"an image must be a path, bytes or a picture, got {type(source).__name__}")
