"""What is published says nothing of where files lie on this machine."""

from __future__ import annotations

from pathlib import Path

from vlmgraft.storage.portable import nameless, portable


def test_absolute_paths_become_relative_or_names(tmp_path: Path) -> None:
    out = tmp_path / "runs" / "merged"
    recipe = {
        "vlm": str(tmp_path / "runs" / "models" / "vlm"),
        "donor": "/elsewhere/models/donor",
        "donor_base": "Qwen/Qwen2.5-7B@main",
        "method": {"name": "frism", "calibration": {"data": "/home/me/questions.jsonl"}, "scale": [0.5, 1]},
        "more_donors": [{"donor": "relative/donor"}],
    }
    assert portable(recipe, out) == {
        "vlm": "../models/vlm",
        "donor": "./donor",
        "donor_base": "Qwen/Qwen2.5-7B@main",
        "method": {"name": "frism", "calibration": {"data": "./questions.jsonl"}, "scale": [0.5, 1]},
        "more_donors": [{"donor": "relative/donor"}],
    }


def test_a_path_behind_a_presets_name_is_one_and_an_address_is_none(tmp_path: Path) -> None:
    given = ["mathvista:/home/me/rows.jsonl", "lab:3", "http://127.0.0.1:8000/v1", "lmms:pope,mmstar"]
    assert portable(given, tmp_path / "out") == ["mathvista:./rows.jsonl", *given[1:]]


def test_a_relative_place_leads_back_from_the_output(tmp_path: Path) -> None:
    (tmp_path / "models").mkdir()
    written = portable(str(tmp_path / "models"), tmp_path / "merged")
    assert (tmp_path / "merged" / written).resolve() == (tmp_path / "models").resolve()


def test_texts_lose_their_folders_and_nothing_else() -> None:
    said = {
        "base": "/home/me/models/base is nearest: ‖τ‖/‖W‖ 1/2",
        "at": ["mlp/3", "https://arxiv.org/abs/1", "a /b c"],
    }
    assert nameless(said) == said | {"base": "./base is nearest: ‖τ‖/‖W‖ 1/2"}
    assert nameless("vlm: /opt/a/vlm\ndonor: org/name\n") == "vlm: ./vlm\ndonor: org/name\n"


def test_servers_are_not_published() -> None:
    method = {
        "donor_endpoint": ["http://inside/v1"],
        "calibration": {"endpoint": "http://inside/v1", "data": "q.jsonl"},
    }
    assert portable({"method": method}, Path("out")) == {"method": {"calibration": {"data": "q.jsonl"}}}
