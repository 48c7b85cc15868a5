"""From checkpoints to a store: τ is what it should be, resuming repeats one matrix at most, changes are noticed."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from vlmgraft.alignment import Alignment, align
from vlmgraft.checkpoint.index import open_checkpoint
from vlmgraft.errors import AlignmentError, NumericalError, OutputError
from vlmgraft.spectral import decompose as decomposing, task_vector as module
from vlmgraft.spectral.decompose import decompose, share
from vlmgraft.spectral.factor_store import FactorStore
from vlmgraft.spectral.svd import matrix_cost
from vlmgraft.spectral.task_vector import TaskVectors, task_vector

LAYERS = [1]
SCRIPT = """
import os, signal, sys, time
from pathlib import Path
import torch
from vlmgraft.alignment import align
from vlmgraft.checkpoint.index import open_checkpoint
from vlmgraft.errors import VlmgraftError
from vlmgraft.spectral.decompose import decompose
from vlmgraft.spectral.factor_store import FactorStore
from vlmgraft.storage.torchrun import leave_group
told, out, late, vlm, *donors, base = map(Path, sys.argv[1:8])
options, rank = sys.argv[8:], int(os.environ["RANK"])
torch.distributed.init_process_group("gloo")
if rank == int(str(late)):  # as on a network file system
    seen, listed = Path.is_file, Path.iterdir
    def old(path):
        return out not in path.parents or time.time() - path.stat().st_mtime > 1
    Path.is_file = lambda path: seen(path) and old(path)
    Path.iterdir = lambda folder: (path for path in listed(folder) if old(path))
if "killed" in options and rank + 1 == int(os.environ["WORLD_SIZE"]):  # it has several matrices
    save = FactorStore.save
    def killed(*args, **more):
        save(*args, **more)
        os.kill(os.getpid(), signal.SIGKILL)
    FactorStore.save = killed
calls = []
alignment = align(*map(open_checkpoint, (vlm, donors[rank % 2], base)), layers=[1])
try:
    decompose(alignment, out, resume="resume" in options,
              progress=lambda done, total, what: calls.append(what) if done < total else None)
    assert FactorStore(out).complete
except VlmgraftError as error:
    calls.append(str(error))
(told / str(rank)).write_text("\\n".join(calls))
leave_group()
"""


def aligned(root: Path, donor: str = "donor", layers: list[int] = LAYERS) -> Alignment:
    vlm, other, base = (open_checkpoint(root / name) for name in ("vlm", donor, "base"))
    return align(vlm, other, base, layers=layers)


def watch(calls: list[str]) -> object:
    return lambda done, total, what: calls.append(what) if done < total else None


def test_the_store_holds_every_matrix_and_a_second_run_does_nothing(folders: Path, tmp_path: Path) -> None:
    alignment, calls = aligned(folders), []
    store = decompose(alignment, tmp_path / "factors", progress=watch(calls))  # type: ignore[arg-type]
    assert list(store) == calls == [tensor.name for tensor in alignment.merged] and len(store) == 7
    for name, factors in store.items():
        assert torch.allclose(factors.update(), task_vector(alignment, name), atol=1e-6)
        assert factors.error <= 1e-5 and factors.role == name.removeprefix("model.")
    stamps = {path: path.stat().st_mtime_ns for path in store.folder.iterdir()}
    again: list[str] = []
    decompose(alignment, store.folder, progress=watch(again))  # type: ignore[arg-type]
    assert again == [] and stamps.keys() == set(store.folder.iterdir())
    assert all(path.stat().st_mtime_ns == stamps[path] for path in stamps)


def test_a_gpu_is_read_for_and_written_from_beside_the_work(
    folders: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a device that is not called cpu, and moves nothing, the bytes are the same; several τ are read ahead."""
    alignment = aligned(folders)
    plain = decompose(alignment, tmp_path / "plain")
    events: list[str] = []
    load, factorized = TaskVectors.load, decomposing.factorize
    monkeypatch.setattr(TaskVectors, "load", lambda taus, name: events.append("read") or load(taus, name))
    monkeypatch.setattr(decomposing, "factorize", lambda *given: events.append("svd") or factorized(*given))
    ordinary = torch.Tensor.to
    monkeypatch.setattr(
        torch.Tensor,
        "to",
        lambda tensor, *args, **options: tensor if args == ("mps",) else ordinary(tensor, *args, **options),
    )
    beside = decompose(alignment, tmp_path / "beside", device="mps")
    monkeypatch.undo()
    assert beside.digest == plain.digest and events.count("svd") == events.count("read") == len(plain) == 7
    assert events.index("svd") > 1, "the next one was asked for before the first was decomposed"
    for name in plain.names:
        files = (tmp_path / folder / f"{name}.safetensors" for folder in ("plain", "beside"))
        assert len({file.read_bytes() for file in files}) == 1


def test_a_finished_store_of_the_same_files_is_believed_and_of_others_read(
    folders: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = tmp_path / "trio"
    shutil.copytree(folders, root)
    monkeypatch.setattr(module, "SETTLED", -1.0)
    digest, read = TaskVectors.digest, []  # type: ignore[var-annotated]
    decompose(aligned(root), tmp_path / "factors")
    monkeypatch.setattr(TaskVectors, "digest", lambda taus, name: read.append(name) or digest(taus, name))
    decompose(aligned(root), tmp_path / "factors")
    assert read == [], "the files have not changed"
    (root / "donor" / "model.safetensors").touch()
    decompose(aligned(root), tmp_path / "factors")
    assert len(read) == 7, "other times: their content is compared"


def test_an_interruption_costs_one_matrix(folders: Path, tmp_path: Path) -> None:
    alignment, out = aligned(folders), tmp_path / "factors"
    whole = decompose(alignment, tmp_path / "whole")

    def stop(done: int, total: int, what: str) -> None:
        if done == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        decompose(alignment, out, progress=stop)
    with pytest.raises(OutputError, match="4 of 7 matrices differ"):
        decompose(alignment, out)
    calls: list[str] = []
    store = decompose(alignment, out, resume=True, progress=watch(calls))  # type: ignore[arg-type]
    assert len(calls) == 4 and store.digest == whole.digest
    assert all(store[name].U.equal(whole[name].U) for name in whole)


def test_changed_inputs_and_another_rank_are_noticed(folders: Path, tmp_path: Path) -> None:
    root, out, changed = tmp_path / "trio", tmp_path / "factors", "model.layers.1.self_attn.k_proj.weight"
    shutil.copytree(folders, root)
    before = decompose(aligned(root), out).digest
    file = root / "donor" / "model.safetensors"
    tensors = load_file(file)
    tensors[changed] = tensors[changed] + 0.01
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(OutputError, match=f"1 of 7 matrices differ, first {changed}"):
        decompose(aligned(root), out)
    calls: list[str] = []
    after = decompose(aligned(root), out, resume=True, progress=watch(calls))  # type: ignore[arg-type]
    assert calls == [changed] and after.digest != before
    with pytest.raises(OutputError, match="7 of 7"):
        decompose(aligned(root), out, rank=4)


def together(
    folders: Path,
    out: Path,
    *options: str,
    late: int = -1,
    donors: tuple[str, str] = ("donor", "donor"),
    processes: int = 2,
) -> tuple[int, list[list[str]]]:
    """Gloo processes decompose into `out`: the exit status, and what each did, or the error that it met. Number `late`
    sees files and folders a while after they were written."""
    told = out.with_name(f"told-{len(list(out.parent.iterdir()))}")
    told.mkdir()
    (script := told / "run.py").write_text(SCRIPT)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    command.append(str(script))
    paths = [str(folders / name) for name in ("vlm", *donors, "base")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*command, str(told), str(out), str(late), *paths, *options], env=environment, timeout=300)
    return done.returncode, [
        (told / str(rank)).read_text().splitlines() if (told / str(rank)).is_file() else [] for rank in range(processes)
    ]


@pytest.mark.slow
@pytest.mark.parametrize("processes", [2, 4])
@pytest.mark.parametrize("late", [-1, 1])
def test_several_processes_share_the_matrices(folders: Path, tmp_path: Path, processes: int, late: int) -> None:
    """With one process's bytes, also where one of them sees files late."""
    whole, out = decompose(aligned(folders), tmp_path / "whole"), tmp_path / "both"
    status, calls = together(folders, out, late=late, processes=processes)
    assert status == 0 and all(calls) and sorted(name for one in calls for name in one) == sorted(whole.names)
    assert all((out / path.name).read_bytes() == path.read_bytes() for path in whole.folder.glob("*.safetensors"))
    assert FactorStore(out).digest == whole.digest


@pytest.mark.slow
@pytest.mark.parametrize(("processes", "late"), [(2, 0), (4, 0)])
def test_several_processes_go_on_after_a_kill(folders: Path, tmp_path: Path, processes: int, late: int) -> None:
    """The first process sees the others' files late: it refuses or resumes for all, and waits for them at the end."""
    whole, out = decompose(aligned(folders), tmp_path / "whole"), tmp_path / "both"
    assert together(folders, out, "killed", late=late, processes=processes)[0] != 0
    kept = {path: path.stat().st_mtime_ns for path in out.glob("*.safetensors")}
    assert 1 <= len(kept) < 7 and not (out / "factors.json").exists()
    status, told = together(folders, out, late=late, processes=processes)
    assert status == 0 and all("resume to redo" in error for (error,) in told), "what one refuses, all do"
    status, calls = together(folders, out, "resume", late=late, processes=processes)
    names = [name for one in calls for name in one]
    assert status == 0 and len(names) == len(set(names)) == 7 - len(kept)
    assert all(path.stat().st_mtime_ns == time for path, time in kept.items()), "what was done is not done again"
    assert all((out / path.name).read_bytes() == path.read_bytes() for path in whole.folder.glob("*.safetensors"))
    assert FactorStore(out).digest == whole.digest


@pytest.mark.slow
def test_a_process_that_sees_other_weights_is_named(folders: Path, tmp_path: Path) -> None:
    root = tmp_path / "trio"
    shutil.copytree(folders, root)
    shutil.copytree(root / "base", root / "other")
    tensors = load_file(file := root / "other" / "model.safetensors")
    save_file({name: tensor + 0.01 for name, tensor in tensors.items()}, file, metadata={"format": "pt"})
    status, told = together(root, tmp_path / "mixed", late=1, donors=("donor", "other"))
    assert status == 0 and all("other weights" in error and ".safetensors" in error for (*_, error) in told)
    assert not (tmp_path / "mixed" / "factors.json").exists()


def test_shares_are_balanced_by_cost() -> None:
    costs = [matrix_cost(shape) for shape in [(2048, 2048), (11008, 2048), (256, 2048), (2048, 11008)] * 9]
    shares = share(costs, 4)
    assert sorted(index for part in shares for index in part) == list(range(36))
    loads = [sum(costs[index] for index in part) for part in shares]
    assert max(loads) <= 1.15 * min(loads)
    assert matrix_cost((4096, 4096), 64) < 0.2 * matrix_cost((4096, 4096))


def test_a_zero_task_vector_is_refused_before_the_first_decomposition(
    folders: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_: object) -> None:
        raise AssertionError("decomposed")

    monkeypatch.setattr("vlmgraft.spectral.decompose.factorize", never)
    vlm, base = (open_checkpoint(folders / name) for name in ("vlm", "base"))
    shutil.copytree(folders / "base", tmp_path / "same")
    same = align(vlm, open_checkpoint(tmp_path / "same"), base, modules=["attention"], layers=LAYERS)
    told = (
        rf"{tmp_path}/same and {folders}/base hold .* all \d+ tensors to be merged \(attention\); write other modules"
    )
    with pytest.raises(AlignmentError, match=told):
        decompose(same, tmp_path / "zero")


def test_bad_inputs_are_named(folders: Path, tmp_path: Path) -> None:
    vlm, base, donor = (open_checkpoint(folders / name) for name in ("vlm", "base", "donor"))
    with pytest.raises(AlignmentError, match="donor_base: missing"):
        TaskVectors(align(vlm, donor, layers=LAYERS))
    with pytest.raises(AlignmentError, match=r"norm.weight: shape .* is not a matrix"):
        TaskVectors(align(vlm, donor, base, modules=["norm"], layers=LAYERS))
    shutil.copytree(folders / "base", tmp_path / "same")
    with pytest.raises(AlignmentError, match="task vector is zero"):
        decompose(align(vlm, open_checkpoint(tmp_path / "same"), base, layers=LAYERS), tmp_path / "zero")
    shutil.copytree(folders / "donor", tmp_path / "nan")
    file, name = tmp_path / "nan" / "model.safetensors", "model.layers.1.mlp.up_proj.weight"
    tensors = load_file(file)
    tensors[name][0, 0] = float("nan")
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(NumericalError, match=f"{name} in .*donor.*: holds NaN"):
        decompose(align(vlm, open_checkpoint(tmp_path / "nan"), base, layers=LAYERS), tmp_path / "out")
