"""Squares whose factors are symmetric: only what stands on and below the diagonal is computed."""

from torch import Tensor

STRIP = 512
"""Columns of a strip at most, so that what is added at a time is small beside the sum."""
STRIPS = 4
"""At least so many strips, where columns are enough for them: three eighths of the products are then saved."""
NARROW = 128
"""Columns of a strip at least: products of fewer are slow."""


def add_square(total: Tensor, x: Tensor) -> None:
    """total += x^T x in the strips on and below the diagonal.

    A product is computed apart and then added: added up where the sum is (``addmm_``), small ones take one rounding a
    token, and a million tokens lose 1e-4.

    Args:
        total: [columns, columns] float32.
        x: [tokens, columns] float32.
    """
    for run in _strips(len(total)):
        below = slice(run.start, None)
        total[below, run] += x[:, below].T @ x[:, run]


def mirror(total: Tensor) -> Tensor:
    """The whole of what ``add_square`` summed, exactly symmetric; in place."""
    for run in _strips(len(total)):  # by strips: no second matrix
        total[run, run.stop :] = total[run.stop :, run].T
        corner = total[run, run].tril()
        total[run, run] = corner + corner.tril(-1).T
    return total


def energy(rows: Tensor, hessian: Tensor) -> float:
    """tr E H E^T, from what stands on and below the diagonal of a symmetric H.

    Args:
        rows: E [rows, columns] float32.
        hessian: H [columns, columns] float32.
    """
    found = 0.0
    for run in _strips(len(hessian)):
        strip, below = rows[:, run], slice(run.stop, None)
        found += float(((strip @ hessian[run, run]) * strip).sum())
        if run.stop < len(hessian):
            found += 2 * float(((rows[:, below] @ hessian[below, run]) * strip).sum())
    return found


def _strips(columns: int) -> list[slice]:
    wide = min(STRIP, max(NARROW, -(-columns // STRIPS)))
    return [slice(start, min(start + wide, columns)) for start in range(0, columns, wide)]
