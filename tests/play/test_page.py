"""`vlmgraft play` in headless Chromium: drop a picture, ask, move the dial; nothing leaves the machine."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

import vlmgraft as vg
from vlmgraft.distillation.front import ROWS, read_path
from vlmgraft.errors import DataError
from vlmgraft.hf.batches import generate_batch, load_questions
from vlmgraft.hf.models import load_processor, load_vlm
from vlmgraft.play.page import answers
from vlmgraft.play.session import opened
from vlmgraft.spectral.gate_store import save_gates
from vlmgraft.spectral.gates import constant_gates
from vlmgraft.storage.jsonl import write_rows

PATIENCE = 300_000
"""Milliseconds until a state that never comes is a failure; nothing waits for time to pass."""


@pytest.fixture(scope="module")
def front(trio: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """factors/ of the lab's pair, and front/ with gates for two budgets, as `front` leaves them."""
    folder = tmp_path_factory.mktemp("play")
    names = {"vlm": "vlm", "donor": "donor", "donor_base": "base"}
    recipe = {key: str(trio / name) for key, name in names.items()} | {"method": {"name": "frism", "inject_weight": 1}}
    recipe["method"]["calibration"] = {"data": "questions.jsonl"}  # type: ignore[index]
    store = vg.decompose(recipe, folder / "factors")
    sizes = {name: tuple(factors.s.shape) for name, factors in store.items()}
    for budget, logit in ((0.01, -2.0), (0.5, 9.0)):
        gates = constant_gates(sizes, logit, 1.0)
        save_gates(type(gates)(gates.logits, gates.scale, factors=store.digest), folder / "front" / f"{budget:g}")
    write_rows(folder / "front" / ROWS, [{"budget": budget} for budget in (0.01, 0.5)])
    return folder


def options(front: Path, trio: Path) -> list[str]:
    return [str(trio / "vlm"), "--gates", str(front / "front"), "--factors", str(front / "factors")]


@pytest.fixture
def address(front: Path, trio: Path, tmp_path: Path) -> Iterator[str]:
    """The command at work; interrupted at the end, which is how it is left, and then no picture is on the disk."""
    if find_spec("gradio") is None:
        pytest.skip("no gradio here: pip install 'vlmgraft[play]'")
    command = [sys.executable, "-m", "vlmgraft", "play", *options(front, trio), "--json", "--max-new-tokens", "24"]
    process = subprocess.Popen(
        [*command, "--device", "cpu"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
        env=os.environ | {"TMPDIR": str(tmp_path), "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)},
    )  # fmt: skip
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        assert line, process.communicate()[1]
        yield json.loads(line)["address"]
        assert [path.read_bytes()[:4] for path in tmp_path.rglob("*.png")] == [b"\x89PNG"], "the picture was here"
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=PATIENCE / 1000)
        assert process.returncode == 130 and "interrupted" in said and "Traceback" not in said, said
        assert list(tmp_path.rglob("*.png")) == []
    finally:
        process.kill()
        process.wait()


@pytest.mark.slow
def test_drop_a_picture_ask_and_move_the_dial(address: str, browser: Any, trio: Path, image_calibration: Path) -> None:
    assert address.startswith("http://127.0.0.1:")
    context = browser.new_context(viewport={"width": 1160, "height": 900})
    context.set_default_timeout(PATIENCE)
    tab, troubles, strangers = context.new_page(), list[str](), list[str]()
    tab.on("pageerror", lambda error: troubles.append(str(error)))
    tab.on(
        "request", lambda one: None if one.url.startswith((address, "data:", "blob:")) else strangers.append(one.url)
    )
    tab.goto(address)
    question = load_questions(image_calibration)[0]
    processor = load_processor(trio / "vlm")
    ids, _ = generate_batch(load_vlm(trio / "vlm"), processor, [question], 24)
    expected = processor.tokenizer.decode(ids[0], skip_special_tokens=True).strip()

    tab.locator("input[type=file]").set_input_files(str(question.images[0]))
    tab.get_by_role("button", name="ask").wait_for()
    tab.locator(".image-frame img").wait_for()
    tab.get_by_label("question").fill(question.question)
    tab.get_by_role("button", name="ask").click()
    finished = tab.get_by_text(re.compile(r"\d+ tokens, KL [\d.]+ nats per token"))
    finished.wait_for()
    vlm, injected = tab.get_by_label("VLM", exact=True), tab.get_by_label("with gates")
    assert vlm.input_value() == expected
    lengths, answer = finished.inner_text(), injected.input_value()
    assert answer and "KL 0.0000" not in lengths

    tab.get_by_role("slider").click(position={"x": 1, "y": 4})  # the left end: strength 0, the VLM itself
    tab.get_by_text("KL 0.0000 nats per token").wait_for()
    assert injected.input_value() == vlm.input_value() == expected

    tab.get_by_label("question").fill(" ")
    tab.get_by_role("button", name="ask").click()
    tab.get_by_text(re.compile("needs 1 to")).wait_for()
    assert troubles == [] and strangers == []
    context.close()


def test_what_the_page_shows(vlm: Any, processor: Any, factors: Any, random_image: Any, tmp_path: Path) -> None:
    random_image(0).save(tmp_path / "picture.png")
    (tmp_path / "words.png").write_text("no picture")
    sizes = {name: len(one.s) for name, one in factors.items()}
    with opened(vlm, processor, factors, [constant_gates(sizes, 0.0, 1.0)]) as session:
        rows = list(answers(session, 6, str(tmp_path / "picture.png"), "colour 1", 1.0))
        assert rows[0][2:] == ("…", "…") and all(rows[-1])
        assert re.fullmatch(r"\d tokens", rows[-1][2])
        assert re.fullmatch(r"\d tokens, KL 0\.\d{4} nats per token of the VLM's answer", rows[-1][3])
        assert list(answers(session, 6, None, "colour 1", 0.0))[-1][3].endswith(
            "KL 0.0000 nats per token of the VLM's answer"
        )
        with pytest.raises(DataError, match="the picture: cannot be read"):
            next(answers(session, 6, str(tmp_path / "words.png"), "colour 1", 1.0))


def test_a_front_is_a_path_of_gates_and_a_gates_folder_one_of_a_single_point(front: Path) -> None:
    path = read_path(front / "front")
    assert list(path) == ["0.01", "0.5"]
    assert [float(next(iter(gates.logits.values()))[0]) for gates in path.values()] == [-2.0, 9.0]
    ((name, alone),) = read_path(front / "front" / "0.5").items()
    assert name == "0.5" and alone.factors == path["0.5"].factors and alone.factors
