"""Codebooks of vectors: beam search for sums of codewords, and the codebooks themselves, compiled.

A vector x of d columns is approximated by one codeword of each of S codebooks, x ~ sum_s C_s[k_s], in the metric
sum_j w_j (x_j - x'_j)^2 (additive quantization: Babenko and Lempitsky 2014; AQLM: Egiazarian et al. 2024).
"""

from typing import Any

import numpy as np
import numpy.typing as npt

from poise.kernels import exact, fast, inlined

Floats = npt.NDArray[np.float32]
Codes = npt.NDArray[np.uint8]


@exact
def beam_search(x: Any, w: Any, codebooks: Any, beam: Any) -> Codes:
    """Codes of the nearest sums, uint8 [n, stages]; the very nearest where there is one stage.

    Args:
        x: [n, dim] vectors.
        w: [k, dim] importance; vector i has row i % k. Where a row is all zero, columns weigh equally.
        codebooks: [stages, dim, size].
        beam: sums that are kept after each stage.
    """
    stages, dim, size = codebooks.shape
    n = x.shape[0]
    out = np.empty((n, stages), dtype=np.uint8)
    distance, weight = np.empty(size, np.float32), np.empty(dim, np.float32)
    residual, rest = np.empty((beam, dim), np.float32), np.empty((beam, dim), np.float32)
    path, trail = np.zeros((beam, stages), np.uint8), np.zeros((beam, stages), np.uint8)
    least, parent, entry = np.empty(beam, np.float32), np.empty(beam, np.int64), np.empty(beam, np.int64)
    for i in range(n):
        heaviest = np.float32(0)
        for j in range(dim):
            heaviest = max(heaviest, w[i % w.shape[0], j])
        for j in range(dim):  # equal importance becomes exactly one, whatever it is
            weight[j] = w[i % w.shape[0], j] / heaviest if heaviest > 0 else np.float32(1)
            residual[0, j] = x[i, j]
        alive = 1
        for stage in range(stages):
            keep = 1 if stage == stages - 1 else beam
            found = 0
            for b in range(alive):
                _distances(residual[b], weight, codebooks[stage], distance)
                found = _insert(distance, b, keep, found, least, parent, entry)
            for k in range(found):
                for j in range(dim):
                    rest[k, j] = residual[parent[k], j] - codebooks[stage, j, entry[k]]
                trail[k, :stage] = path[parent[k], :stage]
                trail[k, stage] = entry[k]
            for k in range(found):
                residual[k], path[k] = rest[k], trail[k]
            alive = found
        out[i] = path[0]
    return out


@inlined
def _distances(x: Any, w: Any, codebook: Any, distance: Any) -> None:
    """Squared distance of x to every codeword."""
    dim, size = codebook.shape
    for k in range(size):
        d = x[0] - codebook[0, k]
        distance[k] = w[0] * d * d
    for j in range(1, dim):
        xj, wj = x[j], w[j]
        for k in range(size):
            d = xj - codebook[j, k]
            distance[k] += wj * d * d


@inlined
def _insert(distance: Any, b: Any, keep: Any, found: Any, least: Any, parent: Any, entry: Any) -> Any:
    """Merges the distances of beam b into the sorted list of the least; returns its length."""
    for k in range(distance.shape[0]):
        d = distance[k]
        if found == keep and not d < least[keep - 1]:
            continue
        place = found if found < keep else keep - 1
        while place > 0 and d < least[place - 1]:
            least[place], parent[place], entry[place] = least[place - 1], parent[place - 1], entry[place - 1]
            place -= 1
        least[place], parent[place], entry[place] = d, b, k
        found = min(found + 1, keep)
    return found


@fast
def update_codebook(x: Any, w: Any, codes: Any, codebooks: Any, stage: Any) -> npt.NDArray[np.float64]:
    """Makes the codewords of one stage the weighted means of what the other stages leave; in place.

    Returns:
        [size, 2 + dim]: of each codeword the number of its vectors, and their squared error about the new codeword,
        in all and by column.
    """
    stages, dim, size = codebooks.shape
    mass, moment, energy = np.zeros((size, dim)), np.zeros((size, dim)), np.zeros((size, dim))
    report = np.zeros((size, 2 + dim))
    for i in range(x.shape[0]):
        k, row = codes[i, stage], i % w.shape[0]
        report[k, 0] += 1
        for j in range(dim):
            r = np.float64(x[i, j])
            for s in range(stages):
                if s != stage:
                    r -= codebooks[s, j, codes[i, s]]
            mass[k, j] += w[row, j]
            moment[k, j] += w[row, j] * r
            energy[k, j] += w[row, j] * r * r
    for k in range(size):
        for j in range(dim):
            if mass[k, j] > 0:
                mean = moment[k, j] / mass[k, j]
                codebooks[stage, j, k] = mean
                report[k, 2 + j] = max(energy[k, j] - mean * moment[k, j], 0.0)
                report[k, 1] += report[k, 2 + j]
    return report


ROUNDS = 4
"""Of k-means after each split of the codewords."""
SETTLING = 16
"""Of k-means, or of all stages in turn, at the end."""
NARROW = 1e-3
"""Distance of the two halves of a split codeword, as a share of their spread."""


def train(x: Floats, w: Floats, stages: int, size: int, beam: int) -> Floats:
    """Codebooks [stages, dim, size] of small squared error for the vectors x [n, dim].

    Stage by stage on what the ones before leave, each by splitting (Linde, Buzo and Gray 1980: no chance in it),
    then all in turn with codes from beam search.
    """
    books = np.zeros((stages, x.shape[1], size), dtype=np.float32)
    codes = np.zeros((len(x), stages), dtype=np.uint8)
    rest = x.copy()
    for stage in range(stages):
        book = books[stage : stage + 1]
        _split_until(rest, w, book)
        codes[:, stage : stage + 1] = beam_search(rest, w, book, 1)
        rest -= book[0].T[codes[:, stage]]
    for _ in range(SETTLING if stages > 1 else 0):
        codes = beam_search(x, w, books, beam)
        for stage in range(stages):
            update_codebook(x, w, codes, books, stage)
    return books


def _split_until(x: Floats, w: Floats, book: Floats) -> None:
    """K-means from one codeword, doubled until all are used; in place, [1, dim, size]."""
    size = book.shape[2]
    count = 1
    codes = np.zeros((len(x), 1), dtype=np.uint8)
    report = update_codebook(x, w, codes, book, 0)
    while count < size:
        worst = np.argsort(-report[:count, 1], kind="stable")[: size - count]
        _split(book, report, worst, np.arange(count, count + len(worst)))
        count += len(worst)
        report = _lloyd(x, w, book, count, SETTLING if count == size else ROUNDS)


def _lloyd(x: Floats, w: Floats, book: Floats, count: int, rounds: int) -> npt.NDArray[np.float64]:
    used = np.ascontiguousarray(book[:, :, :count])
    for _ in range(rounds):
        report = update_codebook(x, w, beam_search(x, w, used, 1), used, 0)
        empty = np.flatnonzero(report[:, 0] == 0)
        if len(empty):  # they share with the codewords that do worst
            _split(used, report, np.argsort(-report[:, 1], kind="stable")[: len(empty)], empty)
    book[:, :, :count] = used
    return report


def _split(book: Floats, report: npt.NDArray[np.float64], old: Any, new: Any) -> None:
    """Puts new codewords beside old ones, along the column where their vectors differ most."""
    along = report[old, 2:].argmax(1)
    step = NARROW * np.sqrt(report[old, 2 + along] / np.maximum(report[old, 0], 1))
    book[0][:, new] = book[0][:, old]
    book[0, along, new] += step.astype(np.float32)
    book[0, along, old] -= step.astype(np.float32)
