"""Servers that answer in a teacher's place: the same targets, or a refusal."""

from __future__ import annotations

import base64
import copy
import io
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

import vlmgraft as vg
from tests.chat_server import chat_server, said
from tests.distillation.test_learn import recipe_of
from vlmgraft.data.endpoint import Endpoint
from vlmgraft.distillation import servers
from vlmgraft.distillation.distill import Distiller
from vlmgraft.distillation.learn import check_inputs
from vlmgraft.distillation.teacher import build_targets
from vlmgraft.errors import DataError, InputError, RecipeError
from vlmgraft.hf.batches import Question, generate_batch
from vlmgraft.hf.modules import tokenizer_of
from vlmgraft.recipe.resolve import resolve
from vlmgraft.storage.jsonl import write_rows


def served(distiller: Distiller, *, ids: bool) -> Any:
    """What a server of the distiller's model replies, with or without token ids."""
    model, processor = copy.deepcopy(distiller.model), distiller.processor
    tokenizer = tokenizer_of(processor)

    def reply(body: dict[str, Any]) -> dict[str, Any]:
        parts, images = body["messages"][0]["content"], []
        for part in parts if isinstance(parts, list) else []:
            if part["type"] == "image_url":
                images.append(Image.open(io.BytesIO(base64.b64decode(part["image_url"]["url"].partition(",")[2]))))
        question = Question(parts if isinstance(parts, str) else parts[-1]["text"], tuple(images))
        (tokens,), (prompt,) = generate_batch(model, processor, [question], body["max_tokens"])
        cut = tokens[-1] != tokenizer.eos_token_id
        text = tokenizer.decode(tokens, skip_special_tokens=True)
        return said(text, tokens=tokens if ids else None, cut=cut, prompt=prompt)

    return reply


@pytest.mark.parametrize("ids", [True, False])
def test_a_server_of_the_model_answers_as_the_model_does(distiller: Distiller, ids: bool, tmp_path: Path) -> None:
    side, options = (distiller.model, distiller.processor), {"max_new_tokens": 6, "batch_size": 12}
    with chat_server(served(distiller, ids=ids)) as url:
        endpoint = Endpoint(url)
        found = build_targets(side, side, distiller.questions, endpoint=endpoint, cache=tmp_path, **options)
    assert found.answers == distiller.targets.answers
    pairs = zip(found.batches, distiller.targets.batches, strict=True)
    assert all(torch.allclose(one.target.log_p, other.target.log_p, atol=1e-5) for one, other in pairs)
    again = build_targets(side, side, distiller.questions, endpoint=endpoint, cache=tmp_path, **options)
    assert again.answers == found.answers, "kept: the server is gone"


@pytest.mark.parametrize("tokens", ["answer", "all"])
def test_another_models_answers_are_refused_and_forgotten(distiller: Distiller, tokens: Any, tmp_path: Path) -> None:
    """So that the right server is asked when the command is run again, at the same address even."""
    side, options = (distiller.model, distiller.processor), {"max_new_tokens": 6, "batch_size": 12, "cache": tmp_path}
    right = served(distiller, ids=True)
    shift = [1]

    def reply(body: dict[str, Any]) -> dict[str, Any]:
        found = right(body)
        found["choices"][0]["token_ids"] = [token + shift[0] for token in found["choices"][0]["token_ids"]]
        return found

    with chat_server(reply) as url:
        with pytest.raises(DataError, match="serve the same"):
            build_targets(side, side, distiller.questions, endpoint=Endpoint(url), tokens=tokens, **options)
        shift[0] = 0
        found = build_targets(side, side, distiller.questions, endpoint=Endpoint(url), tokens=tokens, **options)
    assert found.answers == distiller.targets.answers
    with chat_server(lambda body: said("", tokens=[10**6])) as url, pytest.raises(DataError, match="the model has not"):
        build_targets(side, side, distiller.questions, endpoint=Endpoint(url))


def test_one_strange_answer_among_many_is_found(distiller: Distiller, monkeypatch: pytest.MonkeyPatch) -> None:
    """Half of a batch's tokens would be the model's own."""
    monkeypatch.setattr(servers, "LONG_ENOUGH", 4)
    right, calls = served(distiller, ids=True), [0]

    def reply(body: dict[str, Any]) -> dict[str, Any]:
        calls[0] += 1
        return said("", tokens=[9] * 6, cut=True) if calls[0] == 5 else right(body)

    side = distiller.model, distiller.processor
    with chat_server(reply) as url, pytest.raises(DataError, match="an answer's tokens"):
        build_targets(side, side, distiller.questions, max_new_tokens=6, batch_size=12, endpoint=Endpoint(url))


def test_servers_are_asked_for_their_model_before_any_work(
    trio: Path, second: Path, image_calibration: Path, tmp_path: Path
) -> None:
    write_rows(tmp_path / "sums.jsonl", [{"question": "sum 4 5"}] * 2)
    options = {"inject": "donor", "questions": str(tmp_path / "sums.jsonl"), "inject_weight": 1.0}
    models = [{"id": "vlm", "root": str(trio / "vlm")}, {"id": "donor", "root": str(trio / "donor")}]
    with chat_server(lambda body: said(""), models) as url:
        recipe = recipe_of(trio, image_calibration, donor_endpoint=url, **options)
        recipe["method"]["calibration"]["endpoint"] = url
        job = resolve(recipe)
        found = servers.vlm_endpoint(job.recipe, job.method, job.vlm.path)
        assert found is not None and found.serving().model == "vlm"
        (found,) = servers.donor_endpoints(job.recipe, job.method, [job.alignment.donor.path])
        assert found is not None and found.serving().model == "donor"
        check_inputs(job, tmp_path / "gates")
        donors = [str(trio / "donor"), str(second)]
        with pytest.raises(RecipeError, match=r"donor_endpoint: 1 servers for 2 donors"):
            check_inputs(
                resolve(recipe_of(trio, image_calibration, donors, donor_endpoint=[url], **options)), tmp_path / "gates"
            )
    with pytest.raises(InputError, match="is the server up"):
        vg.merge(recipe, tmp_path / "merged", workdir=tmp_path / "work")
    assert not (tmp_path / "work" / "factors").exists(), "nothing was decomposed"
    for wrong, message in (({"donor_endpoint": url}, "inject: donor only"), ({"calibration": {}}, "")):
        changed = recipe_of(trio, image_calibration, **{k: v for k, v in wrong.items() if k != "calibration"})
        if not message:
            changed["method"]["calibration"]["endpoint"], message = "localhost:8000", "must begin with http"
        with pytest.raises(InputError, match=message):
            vg.load_recipe(changed)
