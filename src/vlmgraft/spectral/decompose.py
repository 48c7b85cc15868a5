"""From an alignment to a store of factors, one matrix at a time, resumable and shared between processes."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from vlmgraft.alignment import Alignment
from vlmgraft.errors import AlignmentError, CheckpointError, OutputError
from vlmgraft.spectral.delta import TaskVectors
from vlmgraft.spectral.factors import Factors, FactorStore, factorize
from vlmgraft.spectral.svd import KRYLOV_MAX_RANK, Rank, check_rank
from vlmgraft.spectral.threads import in_turn, one_core_each, workers_for

Progress = Callable[[int, int, str], None]


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

    A store that already holds the factors of the same inputs is left alone. resume: go on with a store that an
    interruption left, or whose inputs changed; matrices whose file fits are not computed again. Under `torchrun` every
    process takes its share of the matrices (by cost), and the one that finds the store complete writes the manifest.
    The bytes do not depend on the number of cores.

    Raises OutputError when `out` holds something else and resume is False, AlignmentError when τ is zero everywhere,
    NumericalError naming a tensor that is not finite.
    """
    check_rank(rank)
    store = FactorStore(out)
    with TaskVectors(alignment) as taus:
        digests = {name: f"{taus.digest(name)}-{_rank_label(rank)}" for name in taus.names}
        todo = [name for name in taus.names if not _fits(store, name, digests[name], train_copy)]
        if todo and not resume and _holds_others(store, todo):
            raise OutputError(
                f"{out}: holds factors of other inputs or is unfinished: {len(todo)} of {len(digests)} matrices "
                f"differ, first {todo[0]}; resume to redo what differs, or choose another folder"
            )
        # shares are cut from all matrices, not from those still to do: every process then cuts them alike
        shared = _my_share(taus.names, [matrix_cost(taus.shape(name), rank) for name in taus.names])
        wanted = set(todo)
        mine = [name for name in shared if name in wanted]
        if mine:
            store.reopen()

        def factors_of(name: str) -> Factors:
            return factorize(taus.load(name).to(device), name, taus.role(name), rank)

        largest = max((math.prod(taus.shape(name)) for name in mine), default=0)
        workers = workers_for(largest) if torch.device(device).type == "cpu" else 1
        with one_core_each():
            for done, (name, factors) in enumerate(in_turn(factors_of, mine, workers)):
                if progress is not None:
                    progress(done, len(mine), name)
                store.save(factors, digests[name], train_copy=train_copy)
        if progress is not None:
            progress(len(mine), len(mine), "factors")
        store.sweep()
        if not store.complete and all(_fits(store, name, digests[name], train_copy) for name in taus.names):
            store.finish(taus.names, {"rank": rank if isinstance(rank, str | int) else dict(rank)})
            if not any(matrix["energy"] > 0 for matrix in store.manifest["matrices"].values()):
                raise AlignmentError("the task vector is zero: the donor and its base hold the same weights")
    return store


def check_store(alignment: Alignment, store: FactorStore, rank: Rank) -> None:
    """Refuse factors of another recipe: other models, other modules, another rank.

    Raises CheckpointError naming the store, the first tensor that differs and the remedy.
    """
    with TaskVectors(alignment) as taus:
        names = store.names
        odd = sorted(set(names) ^ set(taus.names))
        for name in odd or taus.names:
            if odd or not _fits(store, name, f"{taus.digest(name)}-{_rank_label(rank)}", False):
                raise CheckpointError(
                    f"{store.folder}: {name}: these factors are not of this recipe's donor, donor_base, modules, "
                    "layers and rank; run decompose with this recipe, or name its folder"
                )


def matrix_cost(shape: Sequence[int], rank: Rank = "full") -> float:
    """Floating-point operations of one decomposition, to a constant: Gram matrix, eigenvectors, B = τV."""
    if len(shape) == 3:
        return shape[0] * matrix_cost(shape[1:])
    m, n = max(shape), min(shape)
    if isinstance(rank, int) and rank <= KRYLOV_MAX_RANK and 5 * rank <= n:
        return 2.0 * m * n * (5 * rank + rank)
    return 4.0 * m * n * n + 10.0 * n**3


def share(costs: Sequence[float], workers: int) -> list[list[int]]:
    """Indices per worker, balanced by cost: the dearest first, each to the worker with the least work so far."""
    loads, shares = [0.0] * workers, [[] for _ in range(workers)]  # type: tuple[list[float], list[list[int]]]
    for index in sorted(range(len(costs)), key=lambda index: -costs[index]):
        worker = loads.index(min(loads))
        loads[worker] += costs[index]
        shares[worker].append(index)
    return shares


def _my_share(names: list[str], costs: list[float]) -> list[str]:
    """This process's matrices under torchrun (RANK of WORLD_SIZE), all of them otherwise, in disk order."""
    workers, worker = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("RANK", "0"))
    return [names[index] for index in sorted(share(costs, workers)[worker])]


def _fits(store: FactorStore, name: str, digest: str, train_copy: bool) -> bool:
    header = store.header(name)
    return header is not None and header["digest"] == digest and (header["train_copy"] == "yes" or not train_copy)


def _holds_others(store: FactorStore, todo: Sequence[str]) -> bool:
    """Whether the folder holds anything at all; under torchrun, files of matrices that do not fit: another process may
    have begun with its share."""
    if not store.folder.exists():
        return False
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        return any(store.header(name) is not None for name in todo)
    return any(store.folder.iterdir())


def _rank_label(rank: Rank) -> str:
    return str(rank) if isinstance(rank, str | int) else f"energy{rank['energy']:g}"
