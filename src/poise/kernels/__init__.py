"""Loops over weights, compiled by numba: single-threaded, without the interpreter's lock, cached on disk.

Dividing by zero gives infinity or NaN, as in numpy.
"""

from collections.abc import Callable
from typing import TypeVar, cast

from numba import njit

F = TypeVar("F", bound=Callable[..., object])


def fast(function: F) -> F:
    """May reorder sums and contract products; infinities and NaN still mean what they mean."""
    settings = {"nsz", "arcp", "contract", "afn", "reassoc"}
    return cast(F, njit(nogil=True, cache=True, error_model="numpy", fastmath=settings)(function))


def finite(function: F) -> F:
    """As ``fast``, and takes for granted that there is neither infinity nor NaN."""
    return cast(F, njit(nogil=True, cache=True, error_model="numpy", fastmath=True)(function))


def exact(function: F) -> F:
    """Every operation as it is written, in IEEE 754."""
    return cast(F, njit(nogil=True, cache=True, error_model="numpy")(function))


def inlined(function: F) -> F:
    """Becomes a part of the loops that call it."""
    return cast(F, njit(inline="always")(function))
