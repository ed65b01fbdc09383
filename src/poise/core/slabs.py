"""Work on a matrix by slabs of rows, on all cores.

A slab of float32 weights stays in a core's cache through the dozen passes that a format makes over it, and
memory stays bounded. Every slab is one thread's work from start to end: threads meet once a matrix, not
once an operation, so a machine that is busy with something else costs its share and no more.
"""

import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager
from functools import cache
from typing import TypeVar

import torch

WEIGHTS = 1 << 18
"""Weights of a slab: 1 MB of float32, the second-level cache of a core."""

T = TypeVar("T")


def map_slabs(work: Callable[[slice], T], rows: int, columns: int, tile_rows: int = 1) -> list[T]:
    """Results of ``work`` on consecutive slabs of rows, in order; at least one slab, perhaps an empty one.

    Slabs begin at multiples of ``tile_rows``.
    """
    step = tile_rows * max(1, WEIGHTS // max(1, columns * tile_rows))
    slabs = [slice(start, min(start + step, rows)) for start in range(0, max(1, rows), step)]
    with one_thread_each() as threads:
        if min(threads, len(slabs)) == 1:  # one slab, or work that is itself a slab's
            return [work(slab) for slab in slabs]
        started = [_pool(threads, os.getpid()).submit(work, slab) for slab in slabs]
        try:
            return [future.result() for future in started]
        finally:
            for future in started:
                future.cancel()
            wait(started)


@cache
def _pool(threads: int, process: int) -> ThreadPoolExecutor:
    """Threads that stay, since starting them takes as long as a million weights; a forked process has none of its parent's."""
    return ThreadPoolExecutor(threads, thread_name_prefix="slab")


@contextmanager
def one_thread_each() -> Iterator[int]:
    """Makes operations single-threaded and yields how many threads they used before."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield threads
    finally:
        torch.set_num_threads(threads)
