"""What a merge says of itself: what it was made from, and a base that is hardly the donor's."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from merge_builders import aligned, build
from safetensors.torch import load_file, save_file

from vlmgraft.checkpoint.digests import seal
from vlmgraft.merging import merge_tensors, receipt as receipts
from vlmgraft.merging.receipt import finished_receipt
from vlmgraft.methods.task_arithmetic import TaskArithmetic


def test_a_base_that_is_not_the_donors_is_warned_of(tmp_path: Path) -> None:
    build(tmp_path)  # donor and base are drawn apart
    (told,) = (note for note in merge_tensors(aligned(tmp_path), TaskArithmetic(), tmp_path / "far").notes)
    assert told.startswith("warning: ‖donor − donor_base‖ is 1.4 of the VLM's weights") and "inspect" in told
    base = load_file(tmp_path / "donor_base" / "model.safetensors")
    save_file({name: 1.1 * tensor for name, tensor in base.items()}, tmp_path / "donor" / "model.safetensors")
    assert merge_tensors(aligned(tmp_path), TaskArithmetic(), tmp_path / "near").notes == ()


def test_a_receipt_is_of_its_inputs_and_names_all_that_was_read(tmp_path: Path) -> None:
    build(tmp_path)
    alignment = aligned(tmp_path)
    receipt = merge_tensors(alignment, TaskArithmetic(0.3), tmp_path / "out")
    merged = {tensor.name for tensor in alignment.merged}
    assert set(receipt.sources) == {"vlm", "donor", "donor_base"}
    assert set(receipt.sources["donor"]) == set(receipt.sources["donor_base"]) == merged
    assert merged <= set(receipt.sources["vlm"])
    assert not any(row.clamped or row.nonfinite for row in receipt.tensors)
    files = [tmp_path / key / "model.safetensors" for key in ("vlm", "donor", "donor_base")]
    assert finished_receipt(tmp_path / "out", files) == receipt
    os.utime(files[1], ns=(1, 1))
    assert finished_receipt(tmp_path / "out", files) is None, "made from a file of another time"


def test_a_receipt_that_is_none_finished_nothing_and_a_mistake_of_ours_is_raised(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    build(tmp_path)
    merge_tensors(aligned(tmp_path), TaskArithmetic(0.3), tmp_path / "out")
    file, files = tmp_path / "out" / "receipt.json", [tmp_path / "vlm" / "model.safetensors"]
    whole = json.loads(file.read_text())
    changes: tuple[dict[str, Any], ...] = ({"seconds": "1"}, {"tensors": [{"name": "a"}]}, {"notes": None})
    for change in changes:
        document = {**whole, **change}
        file.write_text(json.dumps({**document, "digest": seal(document)}))
        assert finished_receipt(tmp_path / "out", files) is None
    for text in ("", "[]", "{}", json.dumps({**whole, "method": "other"})):  # the last: its digest is another's
        file.write_text(text)
        assert finished_receipt(tmp_path / "out", files) is None
    file.write_text(json.dumps(whole))
    monkeypatch.setattr(receipts, "fingerprint", lambda _: {}["ours"])
    with pytest.raises(KeyError, match="ours"):
        finished_receipt(tmp_path / "out", files)
