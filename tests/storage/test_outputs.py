"""One function decides what may be written where."""

from __future__ import annotations

from pathlib import Path

import pytest

from vlmgraft.errors import OutputError
from vlmgraft.storage.locks import locked
from vlmgraft.storage.outputs import refuse_file, refuse_output, refuse_place


@pytest.mark.parametrize("place", ["/proc/out", "/proc/self/fd/out", "/sys/out", "/dev/out"])
def test_folders_of_the_kernel(place: str) -> None:
    """The lock beside such a folder was tried for ever: making its parent fails as if somebody had removed it."""
    with pytest.raises(OutputError, match="belongs to the kernel"):
        refuse_place(place)
    with pytest.raises(OutputError, match="belongs to the kernel"), locked(place):
        pytest.fail("entered")


def test_inputs_are_kept_apart(tmp_path: Path) -> None:
    source = tmp_path / "models" / "vlm"
    source.mkdir(parents=True)
    (tmp_path / "link").symlink_to(source, target_is_directory=True)
    for out in (
        source,
        source / "out",
        source / "a" / "b",
        tmp_path / "link" / "out",
        tmp_path / "models" / "x" / "..",
    ):
        with pytest.raises(OutputError, match=r"input .*vlm (or lies|lies) inside it"):
            refuse_place(out, [source])
    refuse_place(tmp_path / "models" / "other", [source, "organisation/name"])


def test_a_hub_id_is_no_folder_but_a_path_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    refuse_place("organisation/name", ["organisation/name"])
    with pytest.raises(OutputError):
        refuse_place("organisation/name", [Path("organisation/name")])


def test_only_an_own_folder_may_be_there(tmp_path: Path) -> None:
    out = tmp_path / "out"
    refuse_output(out, ours=str.isdigit)
    out.mkdir()
    (out / "1").touch()
    refuse_output(out, ours=str.isdigit)
    with pytest.raises(OutputError, match="exists"):
        refuse_output(out)
    (out / "a").touch()
    with pytest.raises(OutputError, match="holds a, which this command did not write"):
        refuse_output(out, ours=str.isdigit)
    (tmp_path / "dangling").symlink_to("nowhere")
    with pytest.raises(OutputError, match="exists"):
        refuse_output(tmp_path / "dangling", ours=str.isdigit)
    with pytest.raises(OutputError, match="not a folder"):
        refuse_output(out / "a" / "out")


def test_only_an_own_file_is_replaced(tmp_path: Path) -> None:
    out, link = tmp_path / "page", tmp_path / "link"
    refuse_file(out, lambda head: head == b"ours")
    out.write_bytes(b"ours")
    refuse_file(out, lambda head: head == b"ours")
    with pytest.raises(OutputError, match="is an input"):
        refuse_file(out, lambda head: True, [str(out)])
    out.write_bytes(b"theirs")
    link.symlink_to(out)
    for path, reason in ((out, "did not write it"), (link, "regular"), (tmp_path, "regular")):
        with pytest.raises(OutputError, match=reason):
            refuse_file(path, lambda head: head == b"ours")
    assert out.read_bytes() == b"theirs"
