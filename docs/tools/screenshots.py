"""The screenshots of docs/report.md, from a page of `python -m experiments.lab report`, by headless Chromium:

    python docs/tools/screenshots.py report/report.html
    python docs/tools/screenshots.py http://127.0.0.1:7860/ PICTURE QUESTION    # docs/how-to/play.md

Each is cut to what it shows, and kept in 256 colours.
"""

from __future__ import annotations

import io
import os
import shutil
import sys
from pathlib import Path
from typing import Any

from PIL import Image
from playwright.sync_api import sync_playwright

PICTURES = Path(__file__).parents[1] / "pictures"
SECTIONS = {"report-layers": "layers", "report-directions": "directions", "report-gates": "gates"}
WIDE, PHONE = {"width": 1160, "height": 1100}, {"width": 390, "height": 1900}


def keep(name: str, png: bytes) -> None:
    """Write a picture in few colours."""
    image = (
        Image.open(io.BytesIO(png))
        .convert("RGB")
        .quantize(256, method=Image.Quantize.FASTOCTREE, dither=Image.Dither.NONE)
    )
    image.save(PICTURES / f"{name}.png", optimize=True)


def section(tab: Any, name: str) -> bytes:
    """A section of the page with a margin."""
    box = tab.locator(f"#{name}").bounding_box()
    clip = {"x": box["x"] - 24, "y": box["y"] + 4, "width": box["width"] + 48, "height": box["height"] - 4}
    return bytes(tab.screenshot(full_page=True, clip=clip))


def shoot(browser: Any, page: Path) -> None:
    """All of them: the top of the page wide and on a phone, the sections, one of them in the dark."""
    tab = browser.new_page(viewport=WIDE)
    tab.goto(page.resolve().as_uri())
    keep("report-tradeoff", tab.screenshot())
    for name, place in SECTIONS.items():
        keep(name, section(tab, place))
    tab.emulate_media(color_scheme="dark")
    keep("report-layers-dark", section(tab, "layers"))
    phone = browser.new_page(viewport=PHONE)
    phone.goto(page.resolve().as_uri())
    keep("report-tradeoff-phone", phone.screenshot())


def ask(browser: Any, address: str, picture: str, question: str) -> None:
    """The page of `vlmgraft play` with a question that was answered."""
    tab = browser.new_page(viewport={"width": 1000, "height": 560})
    tab.goto(address)
    tab.locator("input[type=file]").set_input_files(picture)
    tab.locator(".image-frame img").wait_for()
    tab.get_by_label("question").fill(question)
    tab.get_by_role("button", name="ask").click()
    tab.get_by_text("nats per token").wait_for(timeout=600_000)
    keep("play", tab.screenshot(full_page=True))


def main() -> None:
    """Take the pictures of the page named on the command line."""
    path = os.environ.get("CHROMIUM") or shutil.which("chromium")
    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=path, args=["--no-sandbox"])
        if len(sys.argv) == 4:
            ask(browser, *sys.argv[1:])
        else:
            shoot(browser, Path(sys.argv[1]))


if __name__ == "__main__":
    main()
