"""The licence that a folder states, and the one that a merged model is given; the base that a card names."""

from __future__ import annotations

from pathlib import Path

import huggingface_hub
import pytest

from vlmgraft.export.licence import HEAD, card_head, merged_licence, stated_base, stated_licence


@pytest.mark.parametrize(
    ("stated", "head", "words"),
    [
        ({"v": "mit", "d": "mit"}, {"license": "mit"}, ["mit"]),
        (
            {"v": "apache-2.0", "d": "mit"},
            {"license": "other", "license_name": "apache-2.0-and-mit"},
            ["`v`: apache-2.0", "`d`: mit"],
        ),
        ({"v": "apache-2.0", "d": None}, {}, ["`d`", "Look it up"]),
    ],
)
def test_a_licence_is_taken_over_only_where_all_agree(
    stated: dict[str, str | None], head: dict[str, str], words: list[str]
) -> None:
    found, sentence = merged_licence(stated)
    assert found == head and all(word in sentence for word in words)


@pytest.mark.parametrize(
    ("files", "licence"),
    [
        ({}, None),
        ({"README.md": "---\nlicense: apache-2.0\n---\n# x"}, "apache-2.0"),
        ({"README.md": "---\nlicense: other\nlicense_name: qwen-research\n---\n"}, "qwen-research"),
        ({"README.md": "# no head\n", "LICENSE": "MIT License\n\nCopyright"}, "mit"),
        ({"README.md": "---\n[broken: {\n---\n", "LICENSE": "all rights reserved"}, None),
        ({"LICENSE": "\n   Apache License\n   Version 2.0"}, "apache-2.0"),
    ],
)
def test_a_folder_states_its_licence_by_card_or_text(
    files: dict[str, str], licence: str | None, tmp_path: Path
) -> None:
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    assert stated_licence(tmp_path) == licence


@pytest.mark.parametrize(
    ("head", "base"),
    [
        ("base_model: org/base", "org/base"),
        ("base_model: [org/base]", "org/base"),
        ("base_model: [org/one, org/two]", None),
        ("base_model: 3", None),
        ("license: mit", None),
    ],
)
def test_a_card_names_one_base_or_none(head: str, base: str | None, tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text(f"---\n{head}\n---\n# model\n")
    assert stated_base(str(tmp_path)) == base


def test_the_card_of_a_hub_id_is_fetched_at_its_revision(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "README.md").write_text("---\nbase_model: org/base\n---\n")
    asked: list[tuple[str, str, str | None]] = []

    def fetch(name: str, file: str, revision: str | None) -> str:
        asked.append((name, file, revision))
        if name == "org/gone":
            raise OSError("no network")
        return str(tmp_path / file)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", fetch)
    assert stated_base("org/donor@v2") == stated_base("org/donor") == "org/base"
    assert stated_base("org/gone") is None
    assert asked == [
        ("org/donor", "README.md", "v2"),
        ("org/donor", "README.md", None),
        ("org/gone", "README.md", None),
    ]


def test_a_card_is_read_so_far_and_no_farther(tmp_path: Path) -> None:
    """A head that does not end within it is none."""
    (tmp_path / "README.md").write_text("---\nlicense: mit\n" + "#" * HEAD + "\n---\n")
    assert card_head(tmp_path) == {} and card_head(tmp_path / "gone") == {}
    (tmp_path / "README.md").write_text("---\nlicense: mit\n---\n" + "#" * HEAD)
    assert card_head(tmp_path) == {"license": "mit"}
