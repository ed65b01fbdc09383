"""Orthogonal matrices: orders that are promised, orthogonality, and what a seed changes."""

import pytest
import torch

from poise.transforms._orthogonal import hadamard, random_orthogonal, rotation

ORDERS = (1, 2, 4, 8, 12, 16, 20, 24, 28, 32, 36, 40, 44, 48, 60, 64, 68, 72, 76, 80, 84, 96, 108, 128)
WIDTHS = (576, 896, 960, 1536, 2048, 2304, 2560, 3072, 3584, 4096, 5120, 8192)


@pytest.mark.parametrize("n", [*ORDERS, *WIDTHS])
def test_entries_are_signs_and_rows_are_orthogonal(n):
    matrix = hadamard(n)
    assert matrix.shape == (n, n)
    assert torch.allclose(matrix.abs(), torch.full((n, n), n**-0.5, dtype=torch.float64), rtol=1e-12)
    if n <= 1024:
        assert torch.allclose(matrix @ matrix.T, torch.eye(n, dtype=torch.float64), atol=1e-12)
    else:
        probe = torch.randn(n, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        assert torch.allclose(matrix @ (matrix.T @ probe), probe, atol=1e-11)


@pytest.mark.parametrize("n", [3, 6, 10, 14, 18, 52, 92])
def test_other_orders_have_none_here_and_get_a_random_rotation(n):
    """52 and 92 have some, by constructions that are not known here."""
    assert hadamard(n) is None
    matrix = rotation("hadamard", n, 0)
    assert torch.allclose(matrix @ matrix.T, torch.eye(n, dtype=torch.float64), atol=1e-12)


def test_a_seed_decides():
    for make in (lambda seed: random_orthogonal(24, seed), lambda seed: rotation("hadamard", 24, seed)):
        assert torch.equal(make(3), make(3))
        assert not torch.allclose(make(3), make(4))
        assert torch.allclose(make(3) @ make(3).T, torch.eye(24, dtype=torch.float64), atol=1e-12)
