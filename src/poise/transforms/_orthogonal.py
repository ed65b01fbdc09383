"""Orthogonal matrices: Hadamard ones of many orders, and random ones."""

import torch
from torch import Tensor


def hadamard(n: int) -> Tensor | None:
    """A Hadamard matrix over its norm, float64 [n, n], or None where this construction has none.

    Powers of two by Sylvester's doubling, q + 1 for primes q = 3 mod 4 and 2 (q + 1) for primes q = 1 mod 4 by Paley's two
    constructions, and Kronecker products of these. (Paley 1933, On orthogonal matrices.)
    """
    found = _entries(n)
    return None if found is None else found / n**0.5


def _entries(n: int) -> Tensor | None:
    if n == 1:
        return torch.ones(1, 1, dtype=torch.float64)
    if n % 2 or (n > 2 and n % 4):
        return None
    for core in _cores(n):
        rest = n // len(core)
        if len(core) * rest == n and rest & (rest - 1) == 0:
            return torch.kron(core, _sylvester(rest))
    return None


def _cores(n: int) -> list[Tensor]:
    """Matrices whose order is n over a power of two, the smallest first."""
    odd = n
    while odd % 2 == 0:
        odd //= 2
    if odd == 1:
        return [torch.ones(1, 1, dtype=torch.float64)]
    order, found = 4 * odd, []
    while order <= n:
        for make in (_paley_one, _paley_two):
            core = make(order)
            if core is not None:
                found.append(core)
        order *= 2
    return found


def _sylvester(n: int) -> Tensor:
    found = torch.ones(1, 1, dtype=torch.float64)
    step = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64)
    while len(found) < n:
        found = torch.kron(step, found)
    return found


def _paley_one(n: int) -> Tensor | None:
    q = n - 1
    if not _prime(q) or q % 4 != 3:
        return None
    skew = torch.zeros(n, n, dtype=torch.float64)
    skew[0, 1:], skew[1:, 0], skew[1:, 1:] = 1, -1, _jacobsthal(q)
    return skew + torch.eye(n, dtype=torch.float64)


def _paley_two(n: int) -> Tensor | None:
    q = n // 2 - 1
    if not _prime(q) or q % 4 != 1:
        return None
    core = torch.zeros(q + 1, q + 1, dtype=torch.float64)
    core[0, 1:], core[1:, 0], core[1:, 1:] = 1, 1, _jacobsthal(q)
    plus = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64)
    diagonal = torch.tensor([[1.0, -1.0], [-1.0, -1.0]], dtype=torch.float64)
    return torch.kron(core, plus) + torch.kron(torch.eye(q + 1, dtype=torch.float64), diagonal)


def _jacobsthal(q: int) -> Tensor:
    """Quadratic characters of differences modulo a prime."""
    squares = torch.zeros(q, dtype=torch.float64) - 1
    squares[[k * k % q for k in range(1, q)]] = 1
    squares[0] = 0
    places = (torch.arange(q).unsqueeze(0) - torch.arange(q).unsqueeze(1)) % q
    found: Tensor = squares[places]
    return found


def _prime(q: int) -> bool:
    return q > 1 and all(q % k for k in range(2, int(q**0.5) + 1))


def random_orthogonal(n: int, seed: int) -> Tensor:
    """Of the uniform distribution, float64: QR of a Gaussian matrix with positive diagonal (Mezzadri 2007)."""
    dice = torch.Generator().manual_seed(seed)
    q, r = torch.linalg.qr(torch.randn(n, n, dtype=torch.float64, generator=dice))
    found: Tensor = q * r.diagonal().sign()
    return found


def signs(n: int, seed: int) -> Tensor:
    """Random signs, float64 [n]."""
    dice = torch.Generator().manual_seed(seed)
    return torch.randint(2, (n,), generator=dice).double() * 2 - 1


def rotation(kind: str, n: int, seed: int) -> Tensor:
    """Rows of random signs times a Hadamard matrix, or a random orthogonal matrix; the latter too where there is no
    Hadamard matrix of this order."""
    found = hadamard(n) if kind == "hadamard" else None
    return random_orthogonal(n, seed) if found is None else signs(n, seed).unsqueeze(1) * found
