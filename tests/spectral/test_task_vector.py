"""Task vectors against the files they come from, and fingerprints that follow the weights and nothing else."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from vlmgraft.alignment import Alignment, align
from vlmgraft.checkpoint.index import open_checkpoint
from vlmgraft.checkpoint.reader import Reader
from vlmgraft.errors import AlignmentError, NumericalError, WeightsError
from vlmgraft.spectral.task_vector import TaskVectors, checkpoint_digest, task_vector

NAME = "model.layers.1.mlp.up_proj.weight"


def aligned(root: Path) -> Alignment:
    vlm, donor, base = (open_checkpoint(root / name) for name in ("vlm", "donor", "base"))
    return align(vlm, donor, base, layers=[1])


def change(file: Path, name: str, index: tuple[int, int]) -> None:
    tensors = load_file(file)
    tensors[name][index] += 1
    save_file(tensors, file, metadata={"format": "pt"})


def test_tau_is_donor_minus_base(folders: Path) -> None:
    tau = task_vector(aligned(folders), NAME)
    donor, base = (load_file(folders / side / "model.safetensors")[NAME] for side in ("donor", "base"))
    assert tau.dtype == torch.float32 and tau.equal(donor.float() - base.float())


def test_digests_follow_the_weights_of_donor_and_base_only(folders: Path, tmp_path: Path) -> None:
    root = tmp_path / "copy"
    shutil.copytree(folders, root)
    with TaskVectors(aligned(folders)) as taus:
        before = {name: taus.digest(name) for name in taus.names}
    assert len(set(before.values())) == len(before) and {len(digest) for digest in before.values()} == {32}
    os.utime(root / "donor" / "model.safetensors", (0, 0))
    change(root / "vlm" / "model.safetensors", "model.layers.1.mlp.down_proj.weight", (0, 0))
    with TaskVectors(aligned(root)) as taus:
        assert {name: taus.digest(name) for name in taus.names} == before
    for side in ("donor", "base"):
        change(root / side / "model.safetensors", NAME, (0, 0))
        with TaskVectors(aligned(root)) as taus:
            assert {name for name in taus.names if taus.digest(name) != before[name]} == {NAME}
            before = {name: taus.digest(name) for name in taus.names}


def test_a_digest_samples_a_tensor_from_its_first_block_to_its_last(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """32 blocks of 4 KiB: a change in the first or in the last block is noticed."""
    big = tmp_path / "big"
    big.mkdir()
    (big / "config.json").write_text('{"model_type": "llama"}')
    tensors = {"w": torch.zeros(1000, 257)}
    seen = set()
    for index in (None, (0, 0), (999, 250)):
        changed = {"w": tensors["w"].clone()}
        if index is not None:
            changed["w"][index] = 1
        save_file(changed, big / "model.safetensors", metadata={"format": "pt"})
        seen.add(checkpoint_digest(open_checkpoint(big)))
    assert len(seen) == 3
    offsets: list[int] = []
    read = Reader.read_bytes
    monkeypatch.setattr(Reader, "read_bytes", lambda *given: offsets.append(given[2]) or read(*given))
    checkpoint_digest(open_checkpoint(big))
    assert len(offsets) == 32 and offsets[1] - offsets[0] == (1000 * 257 * 4 - 4096) // 31


def test_what_has_no_task_vector_is_refused(folders: Path) -> None:
    vlm, donor, base = (open_checkpoint(folders / name) for name in ("vlm", "donor", "base"))
    with pytest.raises(AlignmentError, match="donor_base: missing"):
        TaskVectors(align(vlm, donor, layers=[1]))
    with pytest.raises(AlignmentError, match=r"norm.weight: shape .* is not a matrix"):
        TaskVectors(align(vlm, donor, base, modules=["norm"], layers=[1]))


@pytest.mark.parametrize(("side", "key"), [("donor", "donor"), ("base", "donor_base")])
def test_the_side_that_holds_nan_is_named(side: str, key: str, folders: Path, tmp_path: Path) -> None:
    root = tmp_path / "copy"
    shutil.copytree(folders, root)
    file = root / side / "model.safetensors"
    tensors = load_file(file)
    tensors[NAME][0, 0] = float("nan")
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(WeightsError, match=rf"{NAME} in .*{side}.* \({key}\): holds NaN"):
        task_vector(aligned(root), NAME)


def test_enormous_weights_pass_and_a_difference_beyond_float32_does_not(folders: Path, tmp_path: Path) -> None:
    """The norm of such a difference overflows float32 although every entry is finite."""
    root, largest = tmp_path / "copy", torch.finfo(torch.float32).max
    shutil.copytree(folders, root)

    def fill(side: str, value: float) -> None:
        file = root / side / "model.safetensors"
        tensors = load_file(file)
        save_file({**tensors, NAME: torch.full(tensors[NAME].shape, value)}, file)

    fill("donor", largest)
    fill("base", 0.0)
    assert float(task_vector(aligned(root), NAME).max()) == largest
    fill("base", -largest)
    with pytest.raises(NumericalError, match="beyond float32"):
        task_vector(aligned(root), NAME)
