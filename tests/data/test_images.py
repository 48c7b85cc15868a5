"""Pictures of every format that is decoded, upright and in eight bits."""

from __future__ import annotations

import io
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vlmgraft.data import images
from vlmgraft.data.images import FORMATS, open_picture, picture_size, read_image, shrunk
from vlmgraft.errors import DataError


@pytest.mark.parametrize("form", [*FORMATS, "MPO"])
def test_every_format_opens(form: str) -> None:
    picture, data = Image.new("RGB", (4, 2), (200, 10, 10)), io.BytesIO()
    picture.save(data, form, **({"save_all": True, "append_images": [picture]} if form == "MPO" else {}))
    opened = open_picture(data.getvalue(), "picture")
    assert opened.mode == "RGB" and opened.size == (4, 2) == picture_size(data.getvalue(), "picture")
    assert np.allclose(opened.getpixel((1, 1)), (200, 10, 10), atol=8)


def test_sixteen_bits_are_scaled_and_not_clipped() -> None:
    data = io.BytesIO()
    Image.fromarray(np.array([[0, 257], [32896, 65535]], dtype=np.uint16)).save(data, "PNG")
    assert np.array(open_picture(data.getvalue(), "picture"))[..., 0].tolist() == [[0, 1], [128, 255]]


def test_a_picture_is_turned_as_its_camera_says() -> None:
    exif, data = Image.Exif(), io.BytesIO()
    exif[0x0112] = 6  # turn by 90 degrees clockwise: the left edge comes up
    picture = Image.new("RGB", (2, 1))
    picture.putpixel((0, 0), (255, 255, 255))
    picture.save(data, "TIFF", exif=exif)
    opened = open_picture(data.getvalue(), "picture")
    assert opened.size == (1, 2) and opened.getpixel((0, 0)) == (255, 255, 255)


@pytest.mark.parametrize(("size", "pixels", "expected"), [
    ((1600, 1200), 480_000, (800, 600)), ((40, 10), 100, (20, 5)), ((30, 30), 900, (30, 30)),
])  # fmt: skip
def test_a_large_picture_shrinks_in_proportion(size: tuple[int, int], pixels: int, expected: tuple[int, int]) -> None:
    assert shrunk(Image.new("RGB", size, "red"), pixels).size == expected


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("orientation", [1, 3, 6])
def test_the_size_is_known_before_a_picture_is_decoded(form: str, orientation: int, tmp_path: Path) -> None:
    exif, path = Image.Exif(), tmp_path / "picture"
    exif[0x0112] = orientation
    Image.new("RGB", (40, 20)).save(path, form, **({} if form in ("GIF", "BMP", "PPM") else {"exif": exif}))
    assert read_image(path, "picture", keep=False).size == open_picture(path, "picture").size


def test_a_png_that_says_behind_its_pixels_how_it_is_turned_has_its_size_too(tmp_path: Path) -> None:
    exif, data, path = Image.Exif(), io.BytesIO(), tmp_path / "late.png"
    exif[0x0112] = 6
    Image.new("RGB", (40, 20)).save(data, "PNG")
    whole, body = data.getvalue(), b"eXIf" + exif.tobytes().removeprefix(b"Exif\0\0")
    chunk = (len(body) - 4).to_bytes(4, "big") + body + zlib.crc32(body).to_bytes(4, "big")
    path.write_bytes(whole[:-12] + chunk + whole[-12:])
    assert read_image(path, "picture", keep=False).size == open_picture(path, "picture").size == (20, 40)


def test_a_jpeg_that_was_cut_off_is_refused_without_decoding_it(tmp_path: Path) -> None:
    picture, path = Image.effect_noise((64, 64), 90), tmp_path / "cut.jpg"
    picture.save(path)
    assert read_image(path, "picture", keep=False).pixels == 64 * 64
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(DataError, match=r"picture: cannot be read, or is corrupt \(its end is missing\)"):
        read_image(path, "picture", keep=False)


@pytest.mark.parametrize("ours", ["upright_rgb", "_verified", "_opened"])
@pytest.mark.parametrize("error", [TypeError, KeyError, RuntimeError, ValueError])
def test_a_mistake_of_ours_is_no_corrupt_picture(
    ours: str, error: type[Exception], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> None:
        raise error("ours")

    monkeypatch.setattr(images, ours, broken)
    Image.new("RGB", (4, 2)).save(tmp_path / "a.png")
    with pytest.raises(error, match="ours"):
        read_image(tmp_path / "a.png", "picture", keep=False)
        open_picture(tmp_path / "a.png", "picture")


def test_what_pillow_raises_names_the_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.png"
    Image.new("RGB", (4, 2)).save(path)
    whole = path.read_bytes()
    path.write_bytes(whole[:40])
    for name, broken in (("cut", path), ("text", b"no picture")):
        with pytest.raises(DataError, match=rf"^{name}: cannot be read, or is corrupt \(.*\); replace it"):
            open_picture(broken, name)
    with pytest.raises(DataError, match=r"^gone: missing; give its path"):
        open_picture(tmp_path / "gone.png", "gone")
    with pytest.raises(DataError, match=r"^nul: cannot be read, or is corrupt \(embedded null byte\)"):
        open_picture(tmp_path / "a\0.png", "nul")
    path.write_bytes(whole)
    monkeypatch.setattr(images, "MAX_PIXELS", 7)
    with pytest.raises(DataError, match=r"^large: enormous \(4×2 pixels; at most 7 are decoded\); shrink it"):
        open_picture(path, "large")
    monkeypatch.setattr(images, "LARGEST_FILE", 7)
    with pytest.raises(DataError, match=r"^heavy: enormous \(more than 7 bytes\); shrink it"):
        read_image(path, "heavy", keep=False)
