"""Pictures of every format that is decoded, upright and in eight bits."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image

from vlmgraft.data.images import FORMATS, open_picture, shrunk


@pytest.mark.parametrize("form", [*FORMATS, "MPO"])
def test_every_format_opens(form: str) -> None:
    picture, data = Image.new("RGB", (4, 2), (200, 10, 10)), io.BytesIO()
    picture.save(data, form, **({"save_all": True, "append_images": [picture]} if form == "MPO" else {}))
    opened = open_picture(data.getvalue(), "picture")
    assert opened.mode == "RGB" and opened.size == (4, 2)
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
