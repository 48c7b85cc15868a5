"""Decoding untrusted images: the common formats, from regular files, with a bounded number of pixels."""

from __future__ import annotations

import base64
import binascii
import hashlib
import io
import math
import re
import struct
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image, ImageFile as PillowFile, ImageOps

from vlmgraft.checkpoint.files import open_regular
from vlmgraft.errors import CheckpointError, DataError

MAX_PIXELS = 61_000_000
"""The resolution of the largest common camera sensors. Pillow needs four bytes per pixel, and as many again for a
conversion: half a gigabyte."""
ORIENTATION, FIRST_TURNED = 0x0112, 5
"""The EXIF key of the camera's orientation, and the first of its values (5 to 8) that exchange width and height. For
TIFF files Pillow has already exchanged them."""
JPEG_END = b"\xff\xd9"
LATE = {b"eXIf": "exif"} | {key.encode(): key for key in ("Raw profile type exif", "XML:com.adobe.xmp")}
"""PNG chunks that may hold the orientation, with Pillow's names; Pillow reads those after the pixels on decoding."""
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF")
"""Formats that are decoded. Pillow supports more, some of which start other programs (EPS runs Ghostscript). MPO files
are opened as JPEG; "MPO" must not be listed, because Pillow stops its search at a format without an opener."""
FAILURES = (
    ArithmeticError,
    AttributeError,
    EOFError,
    LookupError,
    MemoryError,
    OSError,
    RuntimeError,
    SyntaxError,  # its own, of broken PNG
    TypeError,
    ValueError,
    struct.error,
)
"""What Pillow raises over bytes that are no image; they are caught around Pillow's own calls only."""
_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]{1,20}://|data:")
LARGEST_FILE = 1 << 28
"""Maximum size of an image file in bytes."""
ImageSource = Path | bytes | Image.Image | Callable[[], "Path | bytes | Image.Image"]
"""Where a picture is: a file, the bytes of one, the picture itself, or a function that fetches one of these."""


def image_source(value: Any, folder: Path | None) -> ImageSource | None:
    """The image in a row's value: a path (relative to the folder), base64, a PIL image, or the form that `datasets`
    stores. A function gives a function that fetches its image. None for anything else.

    Raises DataError for a URL, which is not downloaded.
    """
    if isinstance(value, bytes | Image.Image):
        return value
    if callable(value):
        return lambda: _fetched(image_source(value(), folder))
    if isinstance(value, Mapping):
        if isinstance(value.get("bytes"), bytes) and value["bytes"]:
            return bytes(value["bytes"])
        value = value.get("path")
    if not isinstance(value, str) or not value:
        return None
    if value.startswith("data:image/"):
        value = value.partition(",")[2] if _base64(value.partition(",")[2]) else value
    if _URL.match(value):
        raise DataError(f"images are not read from URLs: {value[:60]}; download it, and give its path")
    return _base64(value) or (folder or Path()) / value


def _fetched(source: ImageSource | None) -> Path | bytes | Image.Image:
    if source is None or (callable(source) and not isinstance(source, Image.Image)):
        raise DataError("the data holds no picture here")
    return source


def image_content(source: ImageSource | ImageFile) -> bytes:
    """What identifies an image: the SHA-256 of its file, or the pixels of an opened one; raises DataError."""
    if callable(source) and not isinstance(source, Image.Image):
        source = source()
    if isinstance(source, Image.Image):
        with _decoding():
            return repr((source.mode, source.size)).encode() + source.tobytes()
    if isinstance(source, ImageFile):
        return bytes.fromhex(source.digest)
    if isinstance(source, Path):
        with _named(f"image {source}"), _file(source) as file, _decoding():
            source = file.read(LARGEST_FILE + 1)
    return hashlib.sha256(source).digest()


def row_image(value: Any, folder: Path | None, where: str) -> Path | bytes | Image.Image:
    """The fetched `image_source`; raises DataError that begins with `where` if the value holds no image."""
    try:
        source = image_source(value, folder)
    except DataError as error:
        raise DataError(f"{where}: {error}") from None
    if source is None:
        raise DataError(f"{where}: an image must be a path or a picture, got {value!r:.60}; mend the row, or drop it")
    try:
        return source() if callable(source) and not isinstance(source, Image.Image) else source
    except DataError as error:
        raise DataError(f"{where}: {error}; drop the row") from None


def _base64(text: str) -> bytes | None:
    """Decode base64 text that holds an image (as in tab-separated benchmarks); None for anything else."""
    if len(text) < 64 or not text.startswith(("/9j/", "iVBOR", "UklGR", "R0lGO", "Qk")):
        return None
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        return None


@dataclass(frozen=True)
class ImageFile:
    """An image file that was read and validated once. digest: SHA-256 of its bytes. size: width and height of the image
    that `open_picture` returns. data: the bytes, if kept in memory. fetch: reads the bytes of an image inside a data
    set again.

    `str` gives its path.
    """

    path: Path
    digest: str
    size: tuple[int, int] = field(default=(0, 0), compare=False)
    data: bytes | None = field(default=None, repr=False, compare=False)
    fetch: Callable[[], bytes] | None = field(default=None, repr=False, compare=False)

    @property
    def pixels(self) -> int:
        """Width times height."""
        return self.size[0] * self.size[1]

    def __str__(self) -> str:
        return str(self.path)

    def read(self) -> bytes:
        """The validated bytes; raises DataError if the file has changed since."""
        if self.data is not None:
            return self.data
        data = self.fetch() if self.fetch else read_image(self.path, f"image {self}", keep=True).data
        if data is None or hashlib.sha256(data).hexdigest() != self.digest:
            raise DataError(f"image {self}: changed while it was in use; run the command again")
        return data


def read_image(path: Path, name: str, *, keep: bool) -> ImageFile:
    """Read a file once: validate its header and checksums, compute its digest, and with `keep` keep its bytes.

    Raises DataError as `open_picture`.
    """
    with _named(name):
        with _file(path) as file, _decoding():
            data = file.read(LARGEST_FILE + 1)
        size = _verified(data)
    return ImageFile(path, hashlib.sha256(data).hexdigest(), size, data if keep else None)


def image_within(data: bytes, fetch: Callable[[], bytes], name: str) -> ImageFile:
    """An image inside a data set: validated as by `read_image`; its bytes are not kept.

    fetch: reads the bytes again.
    """
    with _named(name):
        size = _verified(data)
    return ImageFile(Path(name), hashlib.sha256(data).hexdigest(), size, fetch=fetch)


def _verified(data: bytes) -> tuple[int, int]:
    """Validate header and checksums (of a JPEG, its end marker) and return width and height as `open_picture` gives
    them. Only a PNG whose orientation may follow the pixels is decoded."""
    if len(data) > LARGEST_FILE:
        raise _enormous(f"more than {LARGEST_FILE:,} bytes")
    with _opened(data) as image:
        if image.format == "JPEG" and image.fp is not None and data.find(JPEG_END, image.fp.tell()) < 0:
            raise _corrupt("its end is missing")
        late = image.format == "PNG" and any(key in data for key, name in LATE.items() if name not in image.info)
        with _decoding():
            turned = image.format != "TIFF" and Image.Image.getexif(image).get(ORIENTATION, 1) >= FIRST_TURNED
            image.verify()
    if late:
        with _opened(data) as image:
            return upright_rgb(image).size
    return (image.height, image.width) if turned else image.size


def open_picture(source: Path | bytes | bytearray, name: str) -> Image.Image:
    """The first frame of a picture in RGB. Its size is checked before anything is decoded.

    Raises:
        DataError: naming the picture: missing, no regular file, another format, enormous, or corrupt.
    """
    with _named(name), _opened(source) as image:
        return upright_rgb(image)


def picture_size(source: Path | bytes | bytearray, name: str) -> tuple[int, int]:
    """Width and height from the header alone, before EXIF orientation; raises DataError as `open_picture`."""
    with _named(name), _opened(source) as image:
        return image.size


def picture_mode(source: Path | bytes, name: str) -> str:
    """Pillow's mode from the header alone; raises DataError as `open_picture`."""
    with _named(name), _opened(source) as image:
        return image.mode


def upright_rgb(image: Image.Image) -> Image.Image:
    """The image in RGB, rotated by its EXIF orientation; 16 bits per pixel are scaled to 8 (Pillow would clip them).

    Raises DataError, without a name, where it cannot be decoded.
    """
    with _decoding():
        if image.mode.startswith("I;16"):
            image = image.convert("I").point(lambda value: value * (1 / 257)).convert("L")
        if image.getexif().get(ORIENTATION, 1) != 1:  # else a copy would be made
            image = ImageOps.exif_transpose(image)
        return image.convert("RGB")


def shrunk(image: Image.Image, pixels: int) -> Image.Image:
    """The picture, scaled down in proportion if it has more than `pixels` pixels."""
    size = shrunk_size(image.size, pixels)
    return image if size == image.size else image.resize(size, Image.Resampling.LANCZOS)


def shrunk_size(size: tuple[int, int], pixels: int) -> tuple[int, int]:
    """Width and height that `shrunk` gives to a picture of this size."""
    if size[0] * size[1] <= pixels:
        return size
    factor = math.sqrt(pixels / (size[0] * size[1]))
    return max(1, math.floor(size[0] * factor)), max(1, math.floor(size[1] * factor))


def check_picture(source: Path | bytes, name: str) -> None:
    """Validate an image's header and checksums without decoding it; raises DataError as `open_picture`."""
    with _named(name), _opened(source) as image, _decoding():
        image.verify()


@contextmanager
def _opened(source: Path | bytes | bytearray) -> Iterator[PillowFile.ImageFile]:
    with _file(source) if isinstance(source, Path) else io.BytesIO(source) as file:
        with warnings.catch_warnings(), _decoding():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            image = Image.open(file, formats=FORMATS)
        width, height = image.size
        if width * height > MAX_PIXELS:
            raise _enormous(f"{width}×{height} pixels; at most {MAX_PIXELS:,} are decoded")
        yield image


def _file(path: Path) -> io.BufferedReader:
    try:
        return open_regular(path)
    except FileNotFoundError:
        raise DataError("missing; give its path relative to the file that names it") from None
    except (OSError, ValueError) as error:  # the second: a path with a NUL
        raise _corrupt(error) from error


@contextmanager
def _decoding() -> Iterator[None]:
    """Convert errors of Pillow, or of reading the file, to DataError without a name."""
    try:
        yield
    except Image.DecompressionBombError as error:
        raise _enormous(error) from error
    except FAILURES as error:
        raise _corrupt(error) from error


@contextmanager
def _named(name: str) -> Iterator[None]:
    """Put the picture's name in front of what is wrong with it."""
    try:
        yield
    except (CheckpointError, DataError) as error:
        raise DataError(f"{error}" if str(error).startswith(name) else f"{name}: {error}") from error


def _enormous(why: object) -> DataError:
    return DataError(f"enormous ({why}); shrink it, or drop its line")


def _corrupt(why: object) -> DataError:
    return DataError(f"cannot be read, or is corrupt ({str(why)[:120]}); replace it, or drop its line")
