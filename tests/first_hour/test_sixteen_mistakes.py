"""Sixteen mistakes of a first hour: each is answered before any work, with what is wrong, where, and what to do.

Every answer is exit code 2 and a line on standard error, within five seconds of processor time; nothing is written.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections import namedtuple
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file, save_file

Patch = pytest.MonkeyPatch
WEIGHTS = "model.safetensors"


@dataclass
class Job:
    """A recipe on links to the trio, the command that merges it, and what must be said: what, where, remedy."""

    folder: Path
    trio: Path
    words: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        for name in ("base", "vlm", "donor"):
            (self.folder / name).symlink_to(self.trio / name)
        Image.new("RGB", (128, 16)).save(self.folder / "grey.png")
        self.questions = self.folder / "calibration.jsonl"
        self.questions.write_text((json.dumps({"question": "read all glyphs", "image": "grey.png"}) + "\n") * 4)
        calibration = {"data": str(self.questions), "samples": 4, "held_out": 0, "max_new_tokens": 4}
        self.recipe: dict[str, Any] = {
            "vlm": str(self.folder / "vlm"),
            "donor": str(self.folder / "donor"),
            "donor_base": str(self.folder / "base"),
            "method": {"name": "frism", "steps": 0, "inject_weight": 0.1, "calibration": calibration},
        }
        self.out = self.folder / "out" / "merged"
        self.out.parent.mkdir()

    def copy(self, name: str) -> Path:
        """A folder of one's own in place of a link."""
        (self.folder / name).unlink()
        shutil.copytree(self.trio / name, self.folder / name)
        return self.folder / name

    def edit(self, file: Path, **changes: Any) -> None:
        """Change keys of a JSON file; None removes one."""
        content = {**json.loads(file.read_text()), **changes} if file.is_file() else changes
        file.write_text(json.dumps({key: value for key, value in content.items() if value is not None}))

    def command(self) -> list[str]:
        """`merge` of this recipe."""
        path = self.folder / "recipe.yaml"
        path.write_text(yaml.safe_dump(self.recipe))
        return ["merge", str(path), "--out", str(self.out), *self.words]


def missing_file(job: Job, patch: Patch) -> list[str]:
    job.questions.unlink()
    return ["no such question file", str(job.questions), "JSON"]


def wrong_column(job: Job, patch: Patch) -> list[str]:
    job.questions.write_text('{"prompt": "read all glyphs", "image": "grey.png"}\n' * 4)
    return ['"question"', f"{job.questions}, line 1", "prompt"]


def swapped(job: Job, patch: Patch) -> list[str]:
    job.recipe |= {"vlm": job.recipe["donor"], "donor": job.recipe["vlm"]}
    return ["is a text model", str(job.folder / "donor"), "exchange the two"]


def gated_model(job: Job, patch: Patch) -> list[str]:
    """The hub's client says what it says of a gated model without a token."""
    from huggingface_hub import errors

    def refuse(*_: Any, **__: Any) -> None:
        raise errors.GatedRepoError("401 Client Error", response=_Response())

    patch.setattr("huggingface_hub.snapshot_download", refuse)
    patch.setattr("huggingface_hub.HfApi.model_info", refuse)
    patch.setattr("huggingface_hub.get_hf_file_metadata", refuse)  # what is asked first, when not offline
    job.recipe["donor"] = "meta-llama/Llama-3.1-8B"
    return ["gated", "meta-llama/Llama-3.1-8B", "accept its terms", "hf auth login"]


class _Response:
    headers: dict[str, str] = {}  # noqa: RUF012
    status_code = 401
    request = None
    text = ""


def full_disk(job: Job, patch: Patch) -> list[str]:
    from vlmgraft.storage import outputs

    patch.setattr(outputs.shutil, "disk_usage", lambda _: namedtuple("Usage", "free")(100_000))
    return ["0.00 GB free", str(job.out), "make room"]


def no_gpu_memory(job: Job, patch: Patch) -> list[str]:
    """A GPU with a few megabytes, of which the dry run learns as of any other."""
    from vlmgraft.costs import device

    patch.setattr(device, "device_of", lambda *_: device.Device("tiny GPU", 1e12, 1e12, 1e12, memory=1e6))
    job.words += ["--dry-run"]
    return ["gates would take", "on tiny GPU, too much", "use more GPUs (torchrun), or a larger one"]


def too_few_questions(job: Job, patch: Patch) -> list[str]:
    job.recipe["method"] |= {"kl_budget": 0.01, "calibration": {**job.recipe["method"]["calibration"], "held_out": 8}}
    del job.recipe["method"]["inject_weight"]
    return ["has 4 questions", str(job.questions), "lower method.calibration.samples"]


def wrong_base(job: Job, patch: Patch) -> list[str]:
    """Of another size: what was pasted from another model's recipe."""
    tensors = load_file(job.trio / "base" / WEIGHTS)
    name = "model.layers.1.mlp.up_proj.weight"
    tensors[name] = tensors[name][:, :64].contiguous()
    save_file(tensors, job.copy("base") / WEIGHTS, metadata={"format": "pt"})
    return ["[256, 64]", str(job.folder / "base"), "choose a donor base of the same size"]


def lora_as_donor(job: Job, patch: Patch) -> list[str]:
    folder = job.copy("donor")
    for path in folder.iterdir():
        path.unlink()
    job.edit(folder / "adapter_config.json", peft_type="LORA", base_model_name_or_path="Qwen/Qwen2.5-7B")
    save_file({"base_model.model.q_proj.lora_A.weight": torch.zeros(2, 2)}, folder / "adapter_model.safetensors")
    return ["adapter", str(folder), "merge_and_unload"]


def quantised_donor(job: Job, patch: Patch) -> list[str]:
    folder = job.copy("donor")
    job.edit(folder / "config.json", quantization_config={"quant_method": "awq", "bits": 4})
    tensors = load_file(folder / WEIGHTS)
    name = "model.layers.1.mlp.up_proj.weight"
    tensors[name.replace("weight", "qweight")] = tensors.pop(name).view(torch.int16).to(torch.int32)
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    return ["quantised by awq", str(folder), "release that it was made from"]


def old_processor_file(job: Job, patch: Patch) -> list[str]:
    """A processor that this transformers does not know any more."""
    folder = job.copy("vlm")
    job.edit(folder / "processor_config.json", processor_class="OldProcessor", image_processor=None)
    job.edit(folder / "preprocessor_config.json", image_processor_type="OldFeatureExtractor")
    return ["no processor that this transformers knows", str(folder), "from the release of its weights"]


def output_exists(job: Job, patch: Patch) -> list[str]:
    job.out.mkdir()
    (job.out / "mine.txt").write_text("keep me")
    return ["exists", str(job.out), "another"]


def no_write_access(job: Job, patch: Patch) -> list[str]:
    """As the kernel answers a user who may not write there; root may write everywhere."""
    make = os.mkdir

    def refuse(path: Any, *mode: Any, **more: Any) -> None:
        if str(job.out.parent) in str(path):
            raise PermissionError(13, "Permission denied", str(path))
        make(path, *mode, **more)

    patch.setattr(os, "mkdir", refuse)
    patch.setattr("vlmgraft.storage.locks.os.open", _denied(job.out.parent))
    return ["Permission denied", str(job.out.parent), "permissions"]


def _denied(folder: Path) -> Callable[..., int]:
    opened = os.open

    def refuse(path: Any, *flags: Any, **more: Any) -> int:
        if str(folder) in str(path):
            raise PermissionError(13, "Permission denied", str(path))
        return opened(path, *flags, **more)

    return refuse


def unknown_option(job: Job, patch: Patch) -> list[str]:
    job.words += ["--work-dir", "w"]
    return ["--work-dir", "No such option", "vlmgraft merge --help"]


def unknown_method(job: Job, patch: Patch) -> list[str]:
    job.recipe["method"] = {"name": "task_arithmetics"}
    return ["task_arithmetics", "method", "task_arithmetic,"]


MISTAKES = (
    missing_file, wrong_column, swapped, gated_model, full_disk, no_gpu_memory, too_few_questions, wrong_base,
    lora_as_donor, quantised_donor, old_processor_file, output_exists, no_write_access, unknown_option, unknown_method,
)  # fmt: skip


@pytest.mark.parametrize("mistake", MISTAKES, ids=lambda mistake: mistake.__name__)
def test_a_mistake_is_answered(
    mistake: Callable[[Job, Patch], list[str]], trio: Path, tmp_path: Path, vlmgraft: Any, monkeypatch: Patch
) -> None:
    job = Job(tmp_path, trio)
    parts = mistake(job, monkeypatch)
    command = job.command()
    before = sorted(map(str, tmp_path.rglob("*")))
    began = time.process_time()
    ran = vlmgraft(*command)
    used = time.process_time() - began
    print(f"{mistake.__name__}: {used:.1f} s: {ran.err.strip()}")
    assert ran.code == 2 and "Traceback" not in ran.err, ran.err
    assert [part for part in parts if part not in ran.err] == [], ran.err
    assert used < 5, "torch and transformers are imported by the first that needs them"
    monkeypatch.undo()
    assert sorted(map(str, tmp_path.rglob("*"))) == before, "nothing is written"


TWICE = """
import os, signal, threading
from vlmgraft import cli, pipeline

signal.signal(signal.SIGINT, signal.default_int_handler)  # shells start what runs in the background with it ignored

def merge(*_, **__):
    threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGINT)).start()
    threading.Timer(0.7, os.kill, (os.getpid(), signal.SIGINT)).start()
    while True:
        try:
            threading.Event().wait()
        except BaseException:
            pass  # as native code that does not come back

pipeline.merge = merge
cli.main()
"""


def test_the_sixteenth_interrupted_twice(trio: Path, tmp_path: Path) -> None:
    job = Job(tmp_path, trio)
    command = [sys.executable, "-c", TWICE, *job.command()]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert ran.returncode == 130 and "Traceback" not in ran.stderr, ran.stderr
    assert "stopping after the piece in hand; once more ends it at once" in ran.stderr and "ended at once" in ran.stderr
    assert not job.out.exists()
