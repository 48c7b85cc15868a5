"""Every folder that has a receipt is checked byte by byte: tuned ones, adapters, and stores of factors."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import xxhash
from hypothesis import given, settings, strategies as st
from safetensors import safe_open

import vlmgraft as vg
from vlmgraft.checkpoint.digests import BLOCK, RECEIPT, files_in, joined, write_receipt
from vlmgraft.errors import CheckpointError
from vlmgraft.lab.exam import draw_exam, save_traces
from vlmgraft.spectral.factor_store import FactorStore, JoinedStore, sources_of_factors
from vlmgraft.spectral.gate_store import save_gates
from vlmgraft.spectral.gates import constant_gates

Make = Callable[[str], Path]


@pytest.fixture(scope="module")
def made(trio: Path, tmp_path_factory: pytest.TempPathFactory) -> Make:
    """The folder of one kind, made when it is first asked for."""
    home, known = tmp_path_factory.mktemp("folders"), {}
    places = {"vlm": str(trio / "vlm"), "donor": str(trio / "donor"), "donor_base": str(trio / "base")}

    def run(kind: str) -> Path:
        out = home / kind
        if kind in known:
            return out
        if kind == "evaluation":
            save_traces(draw_exam(0, "train", {"sum": 2}), home / "traces.jsonl")
            vg.evaluate(places["vlm"], home / "traces.jsonl", out, max_new_tokens=4)
        elif kind == "gates":
            save_gates(constant_gates({"one": 3, "two": 4, "three": (2, 3)}, 0.0, 1.0), out)
        elif kind == "store":
            vg.decompose({**places, "method": "frism", "layers": "0"}, out)
        elif kind == "adapter":
            store = FactorStore(run("store"))
            gates = constant_gates({name: len(store[name].s) for name in store}, 0.0, 1.0)
            save_gates(gates, home / "gates")
            vg.export_lora(home / "gates", out, factors=store.folder, vlm=places["vlm"], rank=2)
        else:
            save_traces(draw_exam(0, "train", {"sum": 2}), home / "traces.jsonl")
            train = {"max_steps": 1, "use_cpu": True, "disable_tqdm": True, "report_to": "tensorboard"}
            extra = {"lora": {"r": 2}} if kind == "tuned adapter" else {}
            vg.tune({**places, "data": {"train": str(home / "traces.jsonl")}, "train": train, **extra}, out)
        known[kind] = True
        return out

    return run


TUNED = [pytest.param(kind, marks=pytest.mark.slow) for kind in ("tuned", "tuned adapter")]
KINDS = ["store", "adapter", "gates", "evaluation", *TUNED]


@pytest.mark.parametrize("kind", ["store", pytest.param("tuned", marks=pytest.mark.slow)])
def test_sources_are_digested_as_they_are_read(kind: str, made: Make, trio: Path) -> None:
    receipt = json.loads((made(kind) / RECEIPT).read_text())
    assert set(receipt["sources"]) == {"donor", "donor_base" if kind == "store" else "vlm"}
    folders = {"vlm": trio / "vlm", "donor": trio / "donor", "donor_base": trio / "base"}
    for key, read in receipt["sources"].items():
        with safe_open(folders[key] / "model.safetensors", "pt") as file:
            assert len(read) >= 4
            for name, digest in read.items():
                raw = file.get_tensor(name).view(torch.uint8).numpy().tobytes()
                assert len(raw) < BLOCK and digest == joined([xxhash.xxh3_128_digest(raw)])
    assert vg.verify(made(kind), sources={key: folders[key] for key in receipt["sources"]}).unchanged
    if kind == "store":
        store = FactorStore(made(kind))
        joint = sources_of_factors(JoinedStore([store, store]))
        assert sources_of_factors(store) == receipt["sources"]
        assert joint == receipt["sources"] | {f"{key}-2": read for key, read in receipt["sources"].items()}


@pytest.mark.parametrize("kind", KINDS)
def test_as_written_with_every_file_and_tensor(kind: str, made: Make) -> None:
    folder = made(kind)
    found = vg.verify(folder)
    assert found.faults == () and found.unlisted == ()
    files = [path for path in files_in(folder) if path != folder / RECEIPT]
    assert found.files == len(files) and found.nbytes == sum(path.stat().st_size for path in files)
    count = 0
    for file in folder.glob("*.safetensors"):
        with safe_open(file, "pt") as opened:
            count += len(opened.keys())
    assert found.tensors == count and (count > 2 or kind == "evaluation")
    if kind.startswith("tuned"):
        assert [file for file in files if file.parent.parent.name == "runs" or file.parent.name == "runs"], (
            "in folders too"
        )


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_any_flipped_byte_is_found(kind: str, made: Make, data: st.DataObject) -> None:
    folder = made(kind)
    file = data.draw(st.sampled_from([path for path in files_in(folder) if path.stat().st_size]))
    before = file.read_bytes()
    place, mask = data.draw(st.integers(0, len(before) - 1)), data.draw(st.integers(1, 255))
    with file.open("r+b") as handle:
        handle.seek(place)
        handle.write(bytes([before[place] ^ mask]))
    try:
        found = vg.verify(folder)
    finally:
        file.write_bytes(before)
    assert {fault.file for fault in found.faults} == {file.relative_to(folder).as_posix()}


@pytest.mark.parametrize("kind", ["store", "gates", TUNED[0]])
def test_missing_cut_and_new_files(kind: str, made: Make, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(made(kind), tmp_path / "copy"))
    weights = sorted(copy.glob("*.safetensors"))[0]
    other = next(path for path in files_in(copy) if path.suffix == ".json" and path.name != RECEIPT)
    weights.write_bytes(weights.read_bytes()[:-1])
    other.unlink()
    (copy / "inner").mkdir()
    (copy / "inner" / "new").touch()
    found = vg.verify(copy)
    assert {fault.file for fault in found.faults} == {weights.name, other.name}
    assert found.unlisted == ("inner/new",)


def test_an_unfinished_store_has_no_receipt(made: Make, tmp_path: Path) -> None:
    copy = FactorStore(shutil.copytree(made("store"), tmp_path / "copy"))
    copy.reopen()
    assert not (copy.folder / RECEIPT).exists()
    with pytest.raises(CheckpointError, match="has no receipt"):
        vg.verify(copy.folder)


def test_digests_of_factors_are_those_of_memory(made: Make, tmp_path: Path) -> None:
    """What the disk changes before the store is finished is found as well: the digests travel in the header."""
    copy = FactorStore(shutil.copytree(made("store"), tmp_path / "copy"))
    names, settings_ = copy.names, {"rank": copy.manifest["rank"]}
    copy.reopen()
    damaged = copy.folder / f"{names[0]}.safetensors"
    raw = bytearray(damaged.read_bytes())
    raw[-1] ^= 1
    damaged.write_bytes(raw)
    copy.finish(names, settings_)
    (fault,) = vg.verify(copy.folder).faults
    assert fault.file == damaged.name and fault.tensor in ("U", "s", "Vh")


def test_tensors_without_elements(tmp_path: Path) -> None:
    import torch
    from safetensors.torch import save_file

    save_file({"empty": torch.zeros(0, 3), "scalar": torch.tensor(1.0)}, tmp_path / "one.safetensors")
    save_file({"empty": torch.zeros(0, 3)}, tmp_path / "other.safetensors")
    write_receipt(tmp_path, {})
    found = vg.verify(tmp_path)
    assert found.faults == () and found.tensors == 3
    receipt = json.loads((tmp_path / RECEIPT).read_text())
    assert [row["file"] for row in receipt["tensors"]] == ["one.safetensors"] * 2 + ["other.safetensors"]
