"""From an alignment to a store of factors, one matrix at a time, resumable and shared between processes."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from vlmgraft.alignment import Alignment
from vlmgraft.errors import CheckpointError, OutputError
from vlmgraft.spectral.factor_store import MANIFEST, SUFFIX, FactorStore, is_store_file
from vlmgraft.spectral.factors import Factors, factorize
from vlmgraft.spectral.rank import Rank, check_rank
from vlmgraft.spectral.svd import matrix_cost
from vlmgraft.spectral.task_vector import TaskVectors, zero_everywhere
from vlmgraft.spectral.threads import in_turn, one_core_each, workers_for
from vlmgraft.storage.outputs import refuse_output
from vlmgraft.storage.progress import Progress
from vlmgraft.storage.torchrun import agreed, await_file, barrier, process

READ_AHEAD = 2
"""Task vectors that as many threads read while a GPU decomposes another; one more is written meanwhile."""


def decompose(
    alignment: Alignment,
    out: str | Path,
    rank: Rank = "full",
    *,
    resume: bool = False,
    train_copy: bool = False,
    device: torch.device | str = "cpu",
    progress: Progress | None = None,
) -> FactorStore:
    """Decompose every merged matrix of the alignment into the store at `out`, and return the store.

    A store that already holds the factors of the same inputs is left unchanged. resume: continue an interrupted store,
    or one whose inputs changed; matrices with a matching file are not recomputed. Under `torchrun` the first process
    decides for all what to do, or refuses. Every process takes its share of the matrices (by cost), and the first one
    writes the manifest once it sees all files and they match its own inputs. The bytes do not depend on the number of
    cores or processes.

    Raises OutputError when `out` holds something else and resume is False, AlignmentError when τ is zero everywhere,
    NumericalError naming a tensor that is not finite.
    """
    check_rank(rank)
    store = FactorStore(out)
    with TaskVectors(alignment) as taus:
        work = _Work(taus, store, rank, train_copy, taus.stamp())
        todo = agreed(partial(work.plan, resume))
        # shares are cut from all matrices, not only the missing ones, so that every process cuts the same shares
        shared = _my_share(taus.names, [matrix_cost(taus.shape(name), rank) for name in taus.names])
        missing = set(todo)
        mine = [name for name in shared if name in missing]
        with one_core_each(), ThreadPoolExecutor(1) as writer:
            saving: Future[None] | None = None
            for done, (name, factors) in enumerate(_made(taus, mine, rank, work.digests, device, work.read)):
                if progress is not None:
                    progress(done, len(mine), name)
                if saving is not None:
                    saving.result()
                saving = writer.submit(
                    store.save, factors, work.digests[name], train_copy=train_copy, sources=taus.digests(name)
                )
            if saving is not None:
                saving.result()
        if progress is not None:
            progress(len(mine), len(mine), "factors")
        barrier()  # every process has done its share
        agreed(work.finish)
    await_file(store.folder / MANIFEST)
    return store


@dataclass
class _Work:
    """What the first process decides about a store, before and after the matrices are decomposed.

    stamp: of the inputs. digests: of the inputs, by matrix, for files found or made. read: τ in memory, by name.
    """

    taus: TaskVectors
    store: FactorStore
    rank: Rank
    train_copy: bool
    stamp: str
    digests: dict[str, str] = field(default_factory=dict)
    read: dict[str, Tensor] = field(default_factory=dict)

    def plan(self, resume: bool) -> list[str]:
        """The matrices to decompose; opens the store for them. Raises OutputError where the folder must not be
        written, and AlignmentError where nothing is done yet and every τ is zero."""
        names, folder, alignment = self.taus.names, self.store.folder, self.taus.alignment
        sources = (alignment.vlm, alignment.donor, alignment.donor_base)
        refuse_output(folder, [source.path for source in sources if source is not None], ours=is_store_file)
        self.digests = _digests_of_stored(self.taus, self.store, self.rank)
        todo = [name for name in names if not _fits(self.store, name, self.digests.get(name), self.train_copy)]
        if todo and not resume and folder.exists() and any(folder.iterdir()):
            raise OutputError(
                f"{folder}: holds factors of other inputs or is unfinished: {len(todo)} of {len(names)} matrices "
                f"differ, first {todo[0]}; resume to redo what differs, or choose another folder"
            )
        if len(todo) == len(names):
            self.read = _smallest_that_differs(self.taus)
        if todo:
            self.store.reopen()
        return todo

    def finish(self) -> None:
        """Write the manifest once all files, including those of other processes, exist and match this process's inputs.

        Raises OutputError naming a file that does not match, AlignmentError when τ is zero everywhere.
        """
        self.store.sweep()
        if self.store.complete:
            return
        for name in self.taus.names:
            file = self.store.folder / f"{name}{SUFFIX}"
            await_file(file)
            digest = self.digests.get(name) or _digest(self.taus, name, self.rank)
            if not _fits(self.store, name, digest, self.train_copy):
                raise OutputError(
                    f"{file}: is not seen by the first process, or was made from other weights than it reads; let all "
                    "processes see the same models and the same folder, and resume"
                )
        settings = {"rank": self.rank if isinstance(self.rank, str | int) else dict(self.rank), "inputs": self.stamp}
        self.store.finish(self.taus.names, settings)
        if not any(matrix["energy"] > 0 for matrix in self.store.manifest["matrices"].values()):
            raise zero_everywhere(self.taus.alignment)


def _smallest_that_differs(taus: TaskVectors) -> dict[str, Tensor]:
    """The smallest nonzero τ, by its name; raises AlignmentError where all τ are zero."""
    for name in sorted(taus.names, key=lambda name: math.prod(taus.shape(name))):
        tau = taus.load(name)
        if tau.any():
            return {name: tau}
    raise zero_everywhere(taus.alignment)


def _made(
    taus: TaskVectors,
    names: Sequence[str],
    rank: Rank,
    digests: dict[str, str],
    device: torch.device | str,
    read: dict[str, Tensor],
) -> Iterator[tuple[str, Factors]]:
    """The factors of these matrices in order: several at a time on CPUs, one after the other with read-ahead on a GPU.

    Missing digests are added to `digests`. read: τ that are already in memory; each is removed when it is used.
    """

    def load(name: str) -> Tensor:
        tau = read.pop(name) if name in read else taus.load(name)
        if name not in digests:  # of the tensor just read, so that no source is read twice
            digests[name] = _digest(taus, name, rank)
        return tau

    def pinned(name: str) -> Tensor:  # in pinned memory, for asynchronous copies to the GPU
        return load(name).pin_memory() if torch.cuda.is_available() else load(name)

    def factors_of(name: str) -> Factors:
        return factorize(load(name), name, taus.role(name), rank)

    if torch.device(device).type == "cpu":
        largest = max((math.prod(taus.shape(name)) for name in names), default=0)
        yield from in_turn(factors_of, names, workers_for(largest))
        return
    for name, tau in in_turn(pinned, names, READ_AHEAD):
        yield name, factorize(tau.to(device, non_blocking=True), name, taus.role(name), rank)


def check_store(alignment: Alignment, store: FactorStore, rank: Rank) -> None:
    """Refuse factors of another recipe: different models, modules or rank.

    Raises CheckpointError naming the store, the first tensor that differs and the remedy.
    """
    with TaskVectors(alignment) as taus:
        unpaired = sorted(set(store.names) ^ set(taus.names))
        digests = {} if unpaired else _digests_of_stored(taus, store, rank)
        for name in unpaired or taus.names:
            if unpaired or not _fits(store, name, digests.get(name), False):
                raise CheckpointError(
                    f"{store.folder}: {name}: these factors are not of this recipe's donor, donor_base, modules, "
                    "layers and rank; run decompose with this recipe, or name its folder"
                )


def share(costs: Sequence[float], workers: int) -> list[list[int]]:
    """Indices per worker, balanced by cost: the costliest first, each to the worker with the least work so far."""
    loads, shares = [0.0] * workers, [[] for _ in range(workers)]  # type: tuple[list[float], list[list[int]]]
    for index in sorted(range(len(costs)), key=lambda index: -costs[index]):
        worker = loads.index(min(loads))
        loads[worker] += costs[index]
        shares[worker].append(index)
    return shares


def _my_share(names: list[str], costs: list[float]) -> list[str]:
    """This process's share of the matrices, in disk order; all of them if there is one process."""
    worker, workers = process()
    return [names[index] for index in sorted(share(costs, workers)[worker])]


def _digest(taus: TaskVectors, name: str, rank: Rank) -> str:
    return f"{taus.digest(name)}-{_rank_label(rank)}"


def _digests_of_stored(taus: TaskVectors, store: FactorStore, rank: Rank) -> dict[str, str]:
    """The digests that the files in the store should have, by name; matrices without a file are left out.

    A complete store with the same stamp is trusted, and no source is opened; otherwise the sources are sampled.
    """
    stamp = taus.stamp()
    believed = bool(stamp) and store.complete and store.manifest.get("inputs") == stamp
    digests = {}
    for name in taus.names:
        if header := store.header(name):
            same = believed and header["digest"].endswith(f"-{_rank_label(rank)}")
            digests[name] = header["digest"] if same else _digest(taus, name, rank)
    return digests


def _fits(store: FactorStore, name: str, digest: str | None, train_copy: bool) -> bool:
    header = store.header(name)
    return header is not None and header["digest"] == digest and (header["train_copy"] == "yes" or not train_copy)


def _rank_label(rank: Rank) -> str:
    return str(rank) if isinstance(rank, str | int) else f"energy{rank['energy']:g}"
