"""Viterbi search in the bitshift trellis, compiled.

From state s a path goes to the states (s << k | b) mod 2^L, b = 0..2^k - 1: the 2^k states that have the same upper
L - k bits p share the 2^k predecessors p + i 2^(L-k). With Q = 2^(L-k) and K = 2^k, the cost of state pK + b is kept
at b Q + p. So all loops but the copy that turns the best predecessors round go over contiguous memory.

The number i of the best predecessor lives in the lowest k bits of its cost: costs are positive floats, which compare
like integers, so one integer minimum finds both.
"""

from typing import Any

import numpy as np
import numpy.typing as npt

from poise.kernels import exact, fast, inlined

Floats = npt.NDArray[np.float32]

FORBIDDEN = np.float32(1e30)
"""Cost of a state that a path must not begin in."""


@fast
def _forward(x: Any, w: Any, first: Any, length: Any, start: Any, code: Any, k: Any, work: Any) -> None:
    """Costs of all states after ``length`` weights from ``first`` on, cyclically.

    Args:
        start: upper L - k bits of the first state, or -1 for any.
        code: values of states, in the order of the costs.
        work: cost, best predecessor of every p, the same turned round, and its number at every step.
    """
    cost, best, turned, back = work
    states, total = code.shape[0], x.shape[0]
    branches = 1 << k
    heads = states >> k
    run = heads >> k
    bits, best_bits = cost.view(np.int32), best.view(np.int32)
    low = np.int32(branches - 1)
    for t in range(length):
        now = (first + t) % total
        if t == 0:
            for p in range(heads):
                turned[p] = np.float32(0) if start < 0 or p == start else FORBIDDEN
        else:
            for r in range(branches):
                chosen = best_bits[r * run : (r + 1) * run]
                for i in range(branches):
                    old = bits[r * heads + i * run : r * heads + (i + 1) * run]
                    number = np.int32(i)
                    if i == 0:
                        for q in range(run):
                            chosen[q] = old[q] & ~low
                    else:
                        for q in range(run):
                            chosen[q] = min(chosen[q], (old[q] & ~low) | number)
            steps = back[t]
            for p in range(heads):
                steps[p] = np.uint8(best_bits[p] & low)
            for r in range(branches):
                part = best[r * run : (r + 1) * run]
                for q in range(run):
                    turned[q * branches + r] = part[q]
        xt, wt = x[now], w[now]
        for b in range(branches):
            values, reached = code[b * heads : (b + 1) * heads], cost[b * heads : (b + 1) * heads]
            for p in range(heads):
                d = xt - values[p]
                reached[p] = turned[p] + wt * d * d


@inlined
def _backward(length: Any, end: Any, k: Any, work: Any, path: Any) -> None:
    """Fills path[:length] with the states of the best path whose last state has the lower L - k bits ``end``
    (-1 for any)."""
    cost, _, _, back = work
    states = cost.shape[0]
    heads = states >> k
    run, low = heads >> k, (1 << k) - 1
    best, state = np.float32(np.inf), 0
    for s in range(states):
        place = (s & low) * heads + (s >> k)
        if cost[place] < best and (end < 0 or (s & (heads - 1)) == end):
            best, state = cost[place], s
    for t in range(length - 1, -1, -1):
        path[t] = state
        p = state >> k
        if t > 0:
            state = p + np.int64(back[t, (p & low) * run + (p >> k)]) * heads


@exact
def _room(states: Any, heads: Any, length: Any) -> Any:
    return (
        np.empty(states, np.float32),
        np.empty(heads, np.float32),
        np.empty(heads, np.float32),
        np.empty((length, heads), np.uint8),
    )


@exact
def encode(x: Any, w: Any, code: Any, k: Any, window: Any) -> npt.NDArray[np.int16]:
    """States of closed paths near the sequences x [n, length], int16 of the same shape.

    A path is closed when its first state follows its last, so that k bits a weight are all there is to store. As in
    QTIP (algorithm 4), a free path through ``window`` weights about the seam says which L - k bits the two
    ends share; then the best path with these is found.

    Args:
        w: [n, length], not negative, at most 1.
    """
    n, length = x.shape
    states = code.shape[0]
    heads = states >> k
    work = _room(states, heads, length)
    path = np.empty(length, np.int64)
    out = np.empty((n, length), np.int16)
    half = window // 2
    for i in range(n):
        _forward(x[i], w[i], length - half, window, -1, code, k, work)
        _backward(window, -1, k, work, path)
        seam = path[half] >> k
        _forward(x[i], w[i], 0, length, seam, code, k, work)
        _backward(length, seam, k, work, path)
        for t in range(length):
            out[i, t] = np.int16(path[t])
    return out


@exact
def free_error(x: Any, w: Any, code: Any, k: Any) -> Floats:
    """Least weighted squared error of a path without ends to meet, for every sequence x [n, length]."""
    n, length = x.shape
    work = _room(code.shape[0], code.shape[0] >> k, length)
    out = np.empty(n, np.float32)
    for i in range(n):
        _forward(x[i], w[i], 0, length, -1, code, k, work)
        out[i] = work[0].min()
    return out
