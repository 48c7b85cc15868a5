"""Merging a chunk of bfloat16 weights in one pass over its bytes, compiled by numba (the extra `fast`).

`engine.py` makes some twenty torch passes over a chunk (widen, merge, norms, round, surviving change). This module does
the same work on 1,024 elements at a time, which stay in the core's L1 cache. The weights equal torch's bit for bit: the
same float32 operations in the same order, with fused multiply-adds where torch has them. This is verified: `is_torch`
merges a probe both ways, and where they differ, as on a processor for which torch rounds differently, torch merges.
Norms are summed in another order than in torch, so that a receipt may differ in the last digits.

Importing this module imports numba. Compiling takes seconds, once per machine: numba caches the result beside this
file, or in the user's cache.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

import numba
import numpy as np
import torch
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from vlmgraft.checkpoint.handles import as_bytes
from vlmgraft.merging.rounding import ChunkFacts
from vlmgraft.methods.base import Fused, Method, TensorContext

VERSION = str(numba.__version__)
BLOCK = 1024
"""Elements processed at a time: four float32 arrays of this length fit into an L1 cache of 32 KB."""
PROBE = 8 * BLOCK + 37
"""Elements of the probe: torch has a separate path for the last ones, which fill no vector."""
ADD, LERP, SUM, TIES = range(4)
LARGEST = 0.5 * torch.finfo(torch.bfloat16).max
SOURCES = ("vlm", "donor", "donor_base", "vlm_base")
FORMS = {"add": ADD, "lerp": LERP, "sum": SUM, "ties": TIES}
OWN, MOVED, ADDED, ERROR, ALONG, CHANGED, ABOVE, KEPT, DONOR_ABOVE, DONOR_KEPT, OTHER, FACTS = range(12)
"""What `merge_chunk` computes: ‖VLM‖², ‖donor − base‖², ‖d‖², ‖w − d‖², ⟨w − d, d⟩, entries with w ≠ 0 (d and w as in
`rounding.py`); per trimmed task vector the magnitudes above, and at or above, the threshold; ‖VLM − its base‖²."""


@intrinsic
def _float_of(typing: Any, bits: Any) -> Any:
    """The float32 with these 32 bits."""
    return types.float32(types.uint32), lambda context, builder, signature, given: builder.bitcast(
        given[0], ir.FloatType()
    )


@intrinsic
def _bits_of(typing: Any, value: Any) -> Any:
    """The 32 bits of a float32."""
    return types.uint32(types.float32), lambda context, builder, signature, given: builder.bitcast(
        given[0], ir.IntType(32)
    )


@intrinsic
def _fma(typing: Any, a: Any, b: Any, c: Any) -> Any:
    """a·b + c of float32, rounded once."""
    return types.float32(
        types.float32, types.float32, types.float32
    ), lambda context, builder, signature, given: builder.fma(*given)


def _compiled(*signature: str, **options: Any) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """numba's decorator; without its cache if no cache folder can be written."""

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        try:
            return numba.njit(*signature, nogil=True, cache=True, **options)(function)
        except (RuntimeError, OSError):  # no folder for the cache, or a full disk
            return numba.njit(*signature, nogil=True, **options)(function)

    return decorate


@_compiled()
def _widen(bits: Any, out: Any) -> None:
    for i in range(bits.size):
        out[i] = _float_of(np.uint32(np.uint32(bits[i]) << np.uint32(16)))


@_compiled()
def _difference(left: Any, right: Any, out: Any) -> None:
    for i in range(left.size):
        high = _float_of(np.uint32(np.uint32(left[i]) << np.uint32(16)))
        out[i] = high - _float_of(np.uint32(np.uint32(right[i]) << np.uint32(16)))


@_compiled()
def _plus_scaled(start: Any, step: Any, factor: Any, out: Any) -> None:
    """start + factor·step."""
    for i in range(start.size):
        out[i] = _fma(step[i], factor, start[i])


@_compiled()
def _lerp(start: Any, end: Any, weight: Any, out: Any) -> None:
    """`torch.lerp`, which interpolates from the nearer end."""
    if abs(weight) < np.float32(0.5):
        for i in range(start.size):
            out[i] = _fma(end[i] - start[i], weight, start[i])
    else:
        for i in range(start.size):
            out[i] = _fma(end[i] - start[i], weight - np.float32(1), end[i])


@_compiled()
def _weighted_sum(left: Any, right: Any, a: Any, b: Any, out: Any) -> None:
    for i in range(left.size):
        out[i] = _fma(right[i], b, left[i] * a)


@_compiled()
def _trim(tau: Any, least: Any, facts: Any, at: Any) -> None:
    """τ where |τ| ≥ least, else 0, in place; updates the counts of `trim.Tally`."""
    above = 0
    kept = 0
    if least > 0:
        for i in range(tau.size):
            size = abs(tau[i])
            above += size > least
            kept += size >= least
            tau[i] = tau[i] if size >= least else np.float32(0)
    else:
        kept = tau.size
        for i in range(tau.size):
            above += abs(tau[i]) > least
    facts[at] += above
    facts[at + 1] += kept


@_compiled()
def _merge_signs(vlm: Any, donor: Any, base: Any, numbers: Any, out: Any) -> None:
    """base + λ·(mean of the weighted τ that have the sign of their sum), rounded like `task_vectors.merge_signs`."""
    own, other, scale = numbers[2], numbers[3], numbers[4]
    zero, one = np.float32(0), np.float32(1)
    for i in range(vlm.size):
        total = vlm[i] + donor[i]
        sign = one if total > zero else (-one if total < zero else zero)
        left, right = vlm[i] * sign, donor[i] * sign
        left = left if left > zero else zero
        right = right if right > zero else zero
        merged = _fma(right, other, left * own)
        both = one if left > zero and right > zero else zero
        merged += np.float32(-0.5) * merged * both  # if both are zero, too: this removes the sign of a zero
        bits = np.uint32(np.uint32(base[i]) << np.uint32(16))
        out[i] = merged * sign * scale + _float_of(bits)


@_compiled()
def _round(vlm: Any, merged: Any, bits: Any, out: Any, error: Any) -> int:
    """Write `merged` in bfloat16, to nearest even; `merged` becomes d, `error` w − d. Returns how many changed."""
    changed = 0
    for i in range(vlm.size):
        whole = np.uint32(_bits_of(merged[i]))
        even = np.uint32(np.uint32(whole >> np.uint32(16)) & np.uint32(1))
        half = np.uint16(np.uint32(np.uint32(whole + np.uint32(0x7FFF)) + even) >> np.uint32(16))
        out[i] = half
        written = _float_of(np.uint32(np.uint32(half) << np.uint32(16))) - vlm[i]
        changed += written != 0
        merged[i] -= vlm[i]
        error[i] = written - merged[i]
    return changed


@_compiled(fastmath={"reassoc", "contract"})
def _inner(left: Any, right: Any) -> Any:
    """⟨left, right⟩, summed in any order."""
    total = np.float32(0)
    for i in range(left.size):
        total += left[i] * right[i]
    return total


@_compiled()
def _merge_block(
    form: Any, numbers: Any, vlm: Any, donor: Any, base: Any, vlm_base: Any, facts: Any,
    own: Any, tau: Any, merged: Any, other: Any,
) -> None:  # fmt: skip
    """own, tau, merged: outputs for the VLM's weights, donor − base and the merged weights, float32; other: scratch.

    Each is a separate array: over rows of a sliced matrix, whose stride is unknown, the loops are not vectorised.
    """
    _widen(vlm, own)
    _difference(donor, base, tau)
    facts[OWN] += _inner(own, own)
    facts[MOVED] += _inner(tau, tau)
    if form == ADD:
        _plus_scaled(own, tau, numbers[0], merged)
    elif form == TIES:
        _difference(vlm, vlm_base, other)
        facts[OTHER] += _inner(other, other)
        _trim(other, numbers[0], facts, ABOVE)
        _trim(tau, numbers[1], facts, DONOR_ABOVE)
        _merge_signs(other, tau, vlm_base, numbers, merged)
    else:
        _widen(donor, other)
        if form == SUM:
            _weighted_sum(own, other, numbers[0], numbers[1], merged)
        else:
            _lerp(other, own, numbers[0], merged)


@_compiled("(int64, float32[::1], uint16[::1], uint16[::1], uint16[::1], uint16[::1], uint16[::1], float64[::1])")
def _merge_chunk(form: Any, numbers: Any, vlm: Any, donor: Any, base: Any, vlm_base: Any, out: Any, facts: Any) -> None:
    whole = np.empty((4, BLOCK), np.float32)
    for start in range(0, vlm.size, BLOCK):
        stop = min(start + BLOCK, vlm.size)
        own, tau = whole[0, : stop - start], whole[1, : stop - start]
        merged, error = whole[2, : stop - start], whole[3, : stop - start]
        bits = vlm[start:stop], donor[start:stop], base[start:stop], vlm_base[start:stop]
        _merge_block(form, numbers, bits[0], bits[1], bits[2], bits[3], facts, own, tau, merged, error)
        facts[CHANGED] += _round(own, merged, bits[0], out[start:stop], error)
        facts[ADDED] += _inner(merged, merged)
        facts[ERROR] += _inner(error, error)
        facts[ALONG] += _inner(error, merged)


def merge_chunk(fused: Fused, pieces: Mapping[str, memoryview], out: memoryview) -> ChunkFacts | None:
    """Merge a chunk's bytes into `out`. None, with `out` undefined, where a weight is not finite or a result may exceed
    bfloat16."""
    bits = {key: np.frombuffer(view, np.uint16) for key, view in pieces.items()}
    base = bits.get("donor_base", bits["donor"])  # without a base ‖donor − base‖ is 0
    facts = np.zeros(FACTS)
    _merge_chunk(
        FORMS[fused.form],
        np.array(fused.numbers, np.float32),
        bits["vlm"],
        bits["donor"],
        base,
        bits.get("vlm_base", bits["vlm"]),
        np.frombuffer(out, np.uint16),
        facts,
    )
    if not math.sqrt(facts[OWN]) + math.sqrt(facts[ADDED]) < LARGEST or not np.isfinite(facts).all():
        return None
    if fused.tally is not None:
        counts = [int(facts[number]) for number in (ABOVE, KEPT, DONOR_ABOVE, DONOR_KEPT)]
        fused.tally(bits["vlm"].size, (counts[0], counts[1]), (counts[2], counts[3]))
    own, moved, added, error, along = map(float, facts[: ALONG + 1])
    return ChunkFacts(moved, added, error, along, int(facts[CHANGED]), weight=own)


@cache
def is_torch(form: str) -> bool:
    """Whether this processor's merges of a form equal torch's bit for bit, on a probe with tiny, equal and zero values.

    They are compared in float32, which shows every difference in rounding; bfloat16 shows one in 10,000.
    """
    from vlmgraft.methods.linear import Linear
    from vlmgraft.methods.task_arithmetic import TaskArithmetic
    from vlmgraft.methods.ties import Ties, TrimmedTies

    ties = (Ties(weights=(1.6, 0.2), scale=0.7), Ties(weights=(-0.6, -0.3), scale=-1))
    forms: dict[str, list[Method]] = {
        "add": [TaskArithmetic(0.3), TaskArithmetic(-1.7)],
        "lerp": [Linear(0.9), Linear(0.3)],
        "sum": [Linear(0.9, 1.1)],
        "ties": [TrimmedTies(one, {"": {"vlm": 2e-4, "donor": 3e-4}}) for one in ties],
    }
    stored, context = _probe(), TensorContext("", (PROBE,), 1)
    pieces, out = {key: as_bytes(one) for key, one in stored.items()}, bytearray(2 * PROBE)
    bits = [np.frombuffer(pieces[key], np.uint16) for key in SOURCES]
    held, facts = np.empty((4, PROBE), np.float32), np.zeros(FACTS)
    for method in forms[form]:
        twin = method.apply({key: tensor.float() for key, tensor in stored.items()}, context)
        fused = method.fused(context)
        if fused is None or merge_chunk(fused, pieces, memoryview(out)) is None:
            return False
        _merge_block(FORMS[form], np.array(fused.numbers, np.float32), *bits, facts, *held)
        whole = np.array_equal(held[2].view(np.int32), twin.numpy().view(np.int32))
        if not whole or out != bytes(as_bytes(twin.bfloat16())):
            return False
    return True


def _probe() -> dict[str, torch.Tensor]:
    """Weights of four checkpoints; some are subnormal, zero of either sign, or equal in several checkpoints."""
    generator = torch.Generator().manual_seed(0)
    start = 0.02 * torch.randn(PROBE, generator=generator)
    start[::7] *= 1e-38  # below the smallest normal
    start[::11], start[5::11] = 0.0, -0.0
    stored = {key: (start + 2e-4 * torch.randn(PROBE, generator=generator)).bfloat16() for key in SOURCES}
    for number, key in enumerate(SOURCES):
        stored[key][number::5] = start[number::5].bfloat16()
        stored[key][::13] = start[::13].bfloat16()
    return stored
