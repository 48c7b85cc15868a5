"""A real vLLM, where one is installed: it chooses between the adapters of a front, and answers in the VLM's place."""

from __future__ import annotations

import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

import vlmgraft as vg
from vlmgraft.data.endpoint import Endpoint
from vlmgraft.data.questions import Question, load_questions, open_images
from vlmgraft.errors import VlmgraftError
from vlmgraft.evaluation.engine import Sampling, VllmEngine
from vlmgraft.export.lora import write_loras
from vlmgraft.hf.batches import generate_batch
from vlmgraft.hf.models import load_processor, load_vlm
from vlmgraft.hf.modules import match_linears
from vlmgraft.spectral.gates import constant_gates

TOKENS = 24


@pytest.mark.slow
def test_each_request_gets_the_merged_weights_tokens_of_its_point(
    trio: Path, tmp_path: Path, image_calibration: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Greedy, in float32, on the lab's VLM; without an adapter the VLM itself answers."""
    pytest.importorskip("vllm", reason="no vLLM here: pip install 'vlmgraft[vllm]'")
    from vllm.lora.request import LoRARequest

    places = {"vlm": str(trio / "vlm"), "donor": str(trio / "donor"), "donor_base": str(trio / "base")}
    method = {"name": "frism", "inject_weight": 1, "rank": "full", "calibration": {"data": str(image_calibration)}}
    store = vg.decompose(places | {"method": method}, tmp_path / "factors")
    sizes = {name: tuple(factors.s.shape) for name, factors in store.items()}
    path = {name: constant_gates(sizes, float("inf"), scale) for name, scale in (("0.01", 0.3), ("0.5", 1.5))}
    write_loras(trio / "vlm", store, path, tmp_path / "adapters", 128, torch.float32)

    processor, questions = load_processor(trio / "vlm"), load_questions(image_calibration)[:6]
    questions = [Question(one.question, tuple(open_images(one))) for one in questions]
    expected: dict[str, list[list[int]]] = {}
    for name, gates in {"": None, **path}.items():
        model = load_vlm(trio / "vlm", torch.float32)
        for tensor, linear in match_linears(model, list(store) if gates else []).items():
            with torch.no_grad():
                linear.weight += store[tensor].update(gates.spectrum(tensor, store[tensor].s))
        expected[name] = [generate_batch(model, processor, [question], TOKENS)[0][0] for question in questions]
    assert expected[""] != expected["0.5"], "the point changes an answer, or the test shows nothing"

    engine = VllmEngine(
        trio / "vlm", processor, Sampling(TOKENS), dtype="float32", enforce_eager=True, enable_lora=True,
        max_lora_rank=128, max_loras=2, max_model_len=256,
    )  # fmt: skip
    requests = {
        name: LoRARequest(name, number, str(tmp_path / "adapters" / name)) for number, name in enumerate(path, 1)
    }
    generate, found = engine.llm.generate, dict[str, list[list[int]]]()
    for name in ("0.5", "", "0.01"):
        rows: list[Any] = []

        def asked(*arguments: Any, name: str = name, rows: list[Any] = rows, **more: Any) -> Any:
            rows += (outputs := generate(*arguments, lora_request=requests.get(name), **more))
            return outputs

        monkeypatch.setattr(engine.llm, "generate", asked)
        engine.answer(questions, 0)
        found[name] = [list(row.outputs[0].token_ids) for row in rows]
    assert found == expected


@pytest.mark.slow
def test_its_server_gives_the_vlms_own_tokens(trio: Path, tmp_path: Path, image_calibration: Path) -> None:
    """The answers of questions with pictures that gates are learned from, the token that ends them included."""
    pytest.importorskip("vllm", reason="no vLLM here: pip install 'vlmgraft[vllm]'")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(trio / "vlm"), "--port", port]
    command += ["--dtype", "float32", "--enforce-eager", "--max-model-len", "256"]
    with (tmp_path / "log").open("w") as log:
        server = subprocess.Popen(command, stdout=log, stderr=log)
    try:
        endpoint = awaited(Endpoint(f"http://127.0.0.1:{port}/v1"), server)
        questions = load_questions(image_calibration)[:12]
        replies = endpoint.answer(questions, TOKENS)
    finally:
        server.terminate()
        server.wait(60)
    model, processor = load_vlm(trio / "vlm", torch.float32), load_processor(trio / "vlm")
    tokens, prompts = generate_batch(model, processor, questions, TOKENS)
    assert [reply.tokens for reply in replies] == tokens and [reply.prompt_tokens for reply in replies] == prompts
    ends = {tokens_[-1] for tokens_, reply in zip(tokens, replies, strict=True) if reply.ended}
    assert ends == {model.generation_config.eos_token_id}, "some answers end by themselves"


def awaited(endpoint: Endpoint, server: subprocess.Popen[bytes]) -> Endpoint:
    """The endpoint once it serves the model; vLLM takes a minute or two to start."""
    for _ in range(300):
        try:
            return endpoint.serving()
        except VlmgraftError:
            assert server.poll() is None, "the server ended"
            time.sleep(1)
    raise AssertionError("the server does not start")
