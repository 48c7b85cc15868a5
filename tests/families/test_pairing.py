"""Every family: the donor put in place of the VLM's language model is the donor, as transformers loads it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from internlm import to_hf
from safetensors.torch import load_file, save_file
from zoo import CASES, Trio, text_model

from vlmgraft.alignment import align, assemble
from vlmgraft.checkpoint.index import open_checkpoint

EVERYTHING = ("all", "embeddings", "head")
Trios = Callable[[str], Trio]


@pytest.mark.parametrize("case", CASES)
def test_the_donor_in_the_vlms_place_is_the_donor(case: str, trio: Trios, tmp_path: Path) -> None:
    folders = trio(case)
    alignment = align(
        *(open_checkpoint(folder) for folder in (folders.vlm, folders.donor, folders.donor_base, folders.vlm_base)),
        modules=EVERYTHING,
    )
    assert alignment.family == folders.case.family
    vlm, donor = (load_file(folder / "model.safetensors") for folder in (folders.vlm, folders.donor))
    grafted = dict(vlm)
    for tensor in alignment.merged:
        assert tensor.donor is not None
        whole = assemble(tensor.donor, donor.__getitem__, tuple(vlm[tensor.name].shape), fill=vlm[tensor.name])
        grafted[tensor.name] = whole.to(vlm[tensor.name].dtype).contiguous()
    out = tmp_path / "grafted"
    out.mkdir()
    save_file(grafted, out / "model.safetensors", metadata={"format": "pt"})
    (out / "config.json").write_bytes((folders.vlm / "config.json").read_bytes())
    _compare(out, folders, tmp_path)


def _compare(out: Path, folders: Trio, tmp_path: Path) -> None:
    """The language model in `out`, read by transformers, is the donor's where both have rows, else the VLM's."""
    if not folders.case.loadable:
        to_hf(out, tmp_path / "hf", folders.plain / "vlm")
        out = tmp_path / "hf"
    ours, theirs = text_model(out), text_model(folders.plain / "donor")
    before = text_model(folders.plain / "vlm")
    assert set(theirs) == set(ours)
    for name, tensor in ours.items():
        rows = min(len(tensor), len(theirs[name])) if tensor.ndim else 0
        assert torch.equal(tensor[:rows], theirs[name][:rows].to(tensor.dtype)), name
        assert torch.equal(tensor[rows:], before[name][rows:]), name
        assert not torch.equal(tensor, before[name]), f"{name}: the donor is the VLM, so the test shows nothing"


@pytest.mark.parametrize("case", CASES)
def test_sources_are_the_donor_as_transformers_puts_it_in_the_vlm(case: str, trio: Trios) -> None:
    """On disk, name by name, for donor and bases alike; all but rows that no donor has."""
    folders = trio(case)
    roles = ("donor", "donor_base", "vlm_base")
    opened = [open_checkpoint(folder) for folder in (folders.vlm, folders.donor, folders.donor_base, folders.vlm_base)]
    alignment = align(*opened, modules=EVERYTHING)
    vlm = load_file(folders.vlm / "model.safetensors")
    for role in roles:
        files, expected = load_file(getattr(folders, role) / "model.safetensors"), folders.in_vlm(role)
        assert list(expected) == list(vlm)
        for tensor in alignment.merged:
            own = vlm[tensor.name]
            ours = assemble(getattr(tensor, role), files.__getitem__, tuple(own.shape), fill=own).float()
            assert torch.equal(ours, expected[tensor.name]), tensor.name
        assert all(torch.equal(expected[t.name], vlm[t.name].float()) for t in alignment.tensors if t.verdict == "kept")
