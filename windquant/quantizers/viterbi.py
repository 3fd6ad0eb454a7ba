"""Viterbi search of the bit-shift trellis with error feedback, compiled for the CPU by numba.

Trellis-coded quantization (Marcellin & Fischer 1990) in the form of QTIP (arXiv 2406.11235): the state is the last
L bits of the code stream, read as a number whose top bits are the newest code: state' = (state >> k) | (code << L-k).
Every state stands for one value. The 2^k states that differ only in their oldest bits have the same successors, so
the best of them is found once:

    cost[s]  = best[s mod 2^(L-k)] + weight (x - table[s])^2
    best'[g] = min_t cost[2^k' g + t]

The work per value is O(2^L) whatever k is. Table and `best` are put in the order in which these two lines, taken
together, go through them, so that vectors are read as they lie and no cost is ever stored. Nor are the choices: the
best of every place are kept, and on the way back the few costs are computed again that the path chose from.

A stream runs down the rows of *one* column, so that error feedback keeps its full strength: a column is finished before
the next one is corrected. Streams begin anew every `tile` rows, so that tiles can be searched (and later decoded) in
parallel.

A stream is a ring: the state before its beginning is the one at its end. So no start state is stored, and the first
rows have as much choice as the others. As in QTIP, a first search (here of the rows around the seam alone) finds that
state; a second one, of the whole stream, begins and ends with it.
"""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from typing import Any, cast

import numba
import numpy as np
from numba.core import codegen
from numpy.typing import NDArray

from windquant import compute

# LLVM spares Intel's processors half the width of their vectors. With all of it the search takes a quarter less time.
config: Any = numba.config
if "+avx512f" in (features := config.CPU_FEATURES or codegen.get_host_cpu_features()):
    config.CPU_FEATURES = f"{features},-prefer-256-bit"


@numba.njit(boundscheck=False, forceinline=True)
def _stage(
    bits: int,
    following: int,
    window: int,
    value: np.float32,
    weight: np.float32,
    table: NDArray[np.float32],
    best: NDArray[np.float32],
    ordered: NDArray[np.float32],
    after: NDArray[np.float32],
) -> None:
    """One place of the search: from its best costs to those of the next place, whose codes have `following` bits.

    With g = 2^k' h + t: ordered[t][h] = best[g], table[t][b][h] is that of the state 2^(L-k) b + g. Inlined with
    constant bounds: only then does LLVM vectorize it.
    """
    branches, oldest, parts = 1 << bits, 1 << following, 1 << (window - bits - following)
    for h in range(parts):
        for t in range(oldest):
            ordered[t * parts + h] = best[h * oldest + t]
    for b in range(branches):
        for h in range(parts):
            error = value - table[b * parts + h]
            lowest = ordered[h] + weight * (error * error)
            for t in range(1, oldest):
                error = value - table[(t * branches + b) * parts + h]
                cost = ordered[t * parts + h] + weight * (error * error)
                if cost < lowest:
                    lowest = cost
            after[b * parts + h] = lowest


@numba.njit(boundscheck=False, forceinline=True)
def _any_stage(
    bits: int,
    following: int,
    window: int,
    value: np.float32,
    weight: np.float32,
    table: NDArray[np.float32],
    best: NDArray[np.float32],
    ordered: NDArray[np.float32],
    after: NDArray[np.float32],
) -> None:
    """`_stage` of any two numbers of bits that can follow each other, 1 to 4 each and at most one apart.

    Spelled out, because the bounds in each have to be constants.
    """
    if bits == 1:
        if following == 1:
            _stage(1, 1, window, value, weight, table, best, ordered, after)
        else:
            _stage(1, 2, window, value, weight, table, best, ordered, after)
    elif bits == 2:
        if following == 1:
            _stage(2, 1, window, value, weight, table, best, ordered, after)
        elif following == 2:
            _stage(2, 2, window, value, weight, table, best, ordered, after)
        else:
            _stage(2, 3, window, value, weight, table, best, ordered, after)
    elif bits == 3:
        if following == 2:
            _stage(3, 2, window, value, weight, table, best, ordered, after)
        elif following == 3:
            _stage(3, 3, window, value, weight, table, best, ordered, after)
        else:
            _stage(3, 4, window, value, weight, table, best, ordered, after)
    elif following == 3:
        _stage(4, 3, window, value, weight, table, best, ordered, after)
    else:
        _stage(4, 4, window, value, weight, table, best, ordered, after)


@numba.njit(boundscheck=False, forceinline=True)
def _chosen(
    first: int,
    count: int,
    groups: int,
    value: np.float32,
    weight: np.float32,
    table: NDArray[np.float32],
    best: NDArray[np.float32],
) -> int:
    """The state that costs least, of `count` ones from `first` on: what `_stage` has taken the best of."""
    state, lowest = first, np.float32(np.inf)
    for candidate in range(first, first + count):
        error = value - table[candidate]
        cost = best[candidate % groups] + weight * (error * error)
        if cost < lowest:
            state, lowest = candidate, cost
    return state


@numba.njit(boundscheck=False, forceinline=True)
def _search(
    even: int,
    odd: int,
    window: int,
    values: NDArray[np.float32],
    weights: NDArray[np.float32],
    table: NDArray[np.float32],
    after_even: NDArray[np.float32],
    after_odd: NDArray[np.float32],
    codes: NDArray[np.uint8],
    decoded: NDArray[np.float32],
    best: NDArray[np.float32],
    ordered: NDArray[np.float32],
    begin: int,
    end: int,
    asked: int,
) -> int:
    """The best path of one stream: its codes and decoded values.

    begin, end: states before the first place and at the last one, -1 where any will do; best: [places + 1, groups] to
    work in. Returns the state before place `asked`.
    """
    last = len(values) - 1
    if begin < 0:
        best[0] = 0
    else:
        best[0] = np.inf
        best[0, begin >> even] = 0
    for place in range(last + (end < 0)):
        bits, following, ordered_table = even, odd, after_even
        if place & 1:
            bits, following, ordered_table = odd, even, after_odd
        _any_stage(
            bits, following, window, values[place], weights[place], ordered_table, best[place], ordered, best[place + 1]
        )
    # a state's group at the place behind it are its newest bits, all but the oldest ones
    state = end
    if end < 0:
        bits, following = (odd, even) if last & 1 else (even, odd)
        group = int(np.argmin(best[last + 1, : 1 << window - following]))
        state = _chosen(
            group << following, 1 << following, 1 << window - bits, values[last], weights[last], table, best[last]
        )
    found = 0
    for place in range(last, -1, -1):
        bits, before = (odd, even) if place & 1 else (even, odd)
        codes[place] = state >> window - bits
        decoded[place] = table[state]
        first = (state & (1 << window - bits) - 1) << bits
        if place:
            state = _chosen(
                first, 1 << bits, 1 << window - before, values[place - 1], weights[place - 1], table, best[place - 1]
            )
        else:
            state = first if begin < 0 else first + (begin & (1 << bits) - 1)
        if place == asked:
            found = state
    return found


@lru_cache(maxsize=4)
def _compiled(window: int) -> Callable[..., None]:
    """Quantizes one stream, the rows from `start` to `stop`, of all columns; the other arguments are those of
    `quantize`, and the arrays that it returns.

    One function for all widths: it compiles in a third of the time that one for each takes. It runs without Python's
    lock, so that threads search several streams. (Numba's own loops in parallel do the same, and take twice as long to
    compile.)
    """

    def stream(
        even: int,
        odd: int,
        columns: NDArray[np.float32],
        scales: NDArray[np.float32],
        weights: NDArray[np.float32],
        feedback: NDArray[np.float32],
        table: NDArray[np.float32],
        after_even: NDArray[np.float32],
        after_odd: NDArray[np.float32],
        seam: int,
        start: int,
        stop: int,
        codes: NDArray[np.uint8],
        decoded: NDArray[np.float32],
        errors: NDArray[np.float32],
    ) -> None:
        width = len(columns)
        length = stop - start
        scale = scales[start:stop]
        normal = np.empty(length, np.float32)
        # no ring is what has an odd number of rows, or fewer bits than a state: it begins in state 0
        ring = length % 2 == 0 and length // 2 * (even + odd) >= window
        side = min(seam, length)
        around = np.empty(2 * side, np.float32)
        heed = np.concatenate((weights[stop - side : stop], weights[start : start + side]))
        around_codes = np.empty(2 * side, np.uint8)
        around_decoded = np.empty(2 * side, np.float32)
        best = np.empty((max(length, 2 * side) + 1, 1 << window - min(even, odd)), np.float32)
        ordered = np.empty(1 << window, np.float32)
        for i in range(width):
            column = columns[i, start:stop]
            out = decoded[i, start:stop]
            for r in range(length):
                normal[r] = column[r] / scale[r]
            code = codes[i, start:stop]
            begin, end = (-1, -1) if ring else (0, -1)
            for turn in range(1 - ring, 2):  # one call in the source: it is inlined, which takes seconds to compile
                if turn:
                    given, counted, chosen, reached, asked = normal, weights[start:stop], code, out, 0
                else:
                    around[:side] = normal[length - side :]
                    around[side:] = normal[:side]
                    given, counted, chosen, reached, asked = around, heed, around_codes, around_decoded, side
                begin = _search(
                    even, odd, window, given, counted, table, after_even, after_odd, chosen, reached, best, ordered,
                    begin, end, asked,
                )  # fmt: skip
                end = begin
            error = errors[i, start:stop]
            diagonal = feedback[i, i]
            for r in range(length):
                out[r] *= scale[r]
                error[r] = (column[r] - out[r]) / diagonal
            for j in range(i + 1, width):
                factor = feedback[i, j]
                target = columns[j, start:stop]
                for r in range(length):
                    target[r] -= error[r] * factor

    # Numba names a function's global data after it. Variants of one name, some compiled and some from the cache, would
    # share that name and then fail.
    stream.__name__ = stream.__qualname__ = f"stream_{window}"
    return cast(Callable[..., None], numba.njit(cache=True, nogil=True, boundscheck=False)(stream))


def quantize(
    columns: NDArray[np.float32],
    scales: NDArray[np.float32],
    weights: NDArray[np.float32],
    feedback: NDArray[np.float32],
    table: NDArray[np.float32],
    pattern: tuple[int, int],
    tile: int,
    seam: int,
    threads: int,
) -> tuple[NDArray[np.uint8], NDArray[np.float32], NDArray[np.float32]]:
    """Quantize a chunk: codes uint8 [width, rows], decoded weights [width, rows], errors (w - q) / U_ii [width, rows].

    columns: float32 [width, rows], overwritten by the compensated weights; scales: [rows]; weights: [rows], importance
    of each row's squared error; feedback: upper triangular U [width, width] with H^-1 = U^T U (GPTQ, arXiv 2210.17323);
    table: [2^L], the values of the states; pattern: bits (1..4) of codes at even and odd rows, both of which fit into a
    state together; tile: rows per stream; seam: even number of rows on either side of a stream's seam that tell the
    state there; threads: most streams that are searched at once.
    """
    even, odd = pattern
    rows, states = columns.shape[1], len(table)
    # the table as `_stage` goes through it: t, the oldest bits at the next place, first
    after_even = np.ascontiguousarray(table.reshape(states >> odd, 1 << odd).T).reshape(states)
    after_odd = np.ascontiguousarray(table.reshape(states >> even, 1 << even).T).reshape(states)
    codes = np.empty(columns.shape, np.uint8)
    decoded, errors = np.empty_like(columns), np.empty_like(columns)
    stream = _compiled(states.bit_length() - 1)

    def search(start: int) -> None:
        stop = min(rows, start + tile)
        stream(
            even, odd, columns, scales, weights, feedback, table, after_even, after_odd, seam, start, stop, codes,
            decoded, errors,
        )  # fmt: skip

    with ThreadPoolExecutor(threads) as pool, compute.aside():
        list(pool.map(search, range(0, rows, tile)))
    return codes, decoded, errors
