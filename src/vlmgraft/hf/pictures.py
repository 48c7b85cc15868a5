"""Decoding pictures that nobody vouched for: the common formats, from regular files, of a bounded number of pixels."""

from __future__ import annotations

import io
import struct
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from PIL import Image

from vlmgraft.checkpoint.files import open_regular
from vlmgraft.errors import CheckpointError, DataError

MAX_PIXELS = 89_478_485
"""Pillow's own bound for a decompression bomb: a quarter of a gigabyte of RGB."""
FORMATS = ("PNG", "JPEG", "MPO", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF")
"""What is decoded. Pillow knows more, some of which start other programs (EPS runs Ghostscript)."""


def open_picture(source: Path | bytes | bytearray, name: str) -> Image.Image:
    """The first frame of a picture in RGB. Its size is checked before anything is decoded.

    Raises:
        DataError: naming the picture: missing, no regular file, another format, enormous, or corrupt.
    """
    with _explained(name), _opened(source) as image:
        return image.convert("RGB")


def check_picture(source: Path | bytes, name: str) -> None:
    """Look at a picture's header and checksums without decoding it; raises as `open_picture`."""
    with _explained(name), _opened(source) as image:
        image.verify()


@contextmanager
def _opened(source: Path | bytes | bytearray) -> Iterator[Image.Image]:
    with open_regular(source) if isinstance(source, Path) else io.BytesIO(source) as file:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            image = Image.open(file, formats=FORMATS)
        width, height = image.size
        if width * height > MAX_PIXELS:
            raise Image.DecompressionBombError(f"{width}×{height} pixels; at most {MAX_PIXELS:,} are decoded")
        yield image


@contextmanager
def _explained(name: str) -> Iterator[None]:
    """Whatever Pillow raises over a picture, as DataError."""
    remedy = "replace it, or drop its line"
    try:
        yield
    except FileNotFoundError:
        raise DataError(f"{name}: missing; give its path relative to the file that names it") from None
    except CheckpointError as error:
        raise DataError(f"{error}" if str(error).startswith(name) else f"{name}: {error}") from None
    except Image.DecompressionBombError as error:
        raise DataError(f"{name}: enormous ({error}); shrink it, or drop its line") from None
    except (
        OSError,
        SyntaxError,
        ValueError,
        TypeError,
        ArithmeticError,
        AttributeError,
        EOFError,
        LookupError,
        MemoryError,
        RuntimeError,
        struct.error,
    ) as error:
        raise DataError(f"{name}: cannot be read, or is corrupt ({str(error)[:120]}); {remedy}") from error
