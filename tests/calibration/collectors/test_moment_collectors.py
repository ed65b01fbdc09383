"""Second moments, Hessians, Fisher information: against float64, and what was planted is found."""

from itertools import pairwise

import pytest
import torch

from poise.calibration.collectors._gram import CHUNK
from poise.calibration.collectors.cross import Cross
from poise.calibration.collectors.fisher import Fisher
from poise.calibration.collectors.hessian import Hessian
from poise.calibration.collectors.kronecker import Kronecker
from poise.calibration.collectors.second_moment import SecondMoment
from poise.core.stats import Stats


def dice(seed=0):
    return torch.Generator().manual_seed(seed)


def inputs(tokens, columns, seed=0):
    """Correlated, with a mean and one large column."""
    x = (
        torch.randn(tokens, columns, generator=dice(seed)) @ torch.randn(columns, columns, generator=dice(1))
        + 0.5
    )
    x[:, 3] *= 100
    return x


def scaled_error(found, expected):
    """Largest error of an entry, relative to the diagonal."""
    root = expected.diagonal().sqrt()
    return float(((found - expected) / (root * root.unsqueeze(1))).abs().max())


@pytest.mark.parametrize("columns", [7, 1100])  # 1100: more than two strips
def test_the_hessian_is_that_of_float64(columns):
    x = inputs(CHUNK + 700, columns)
    collector = Hessian(columns=columns)
    collector.add(x)
    found = collector.result()
    expected = x.double().T @ x.double() / len(x)
    assert scaled_error(found["hessian"].double(), expected) < 2e-6
    assert torch.equal(found["hessian"], found["hessian"].T)
    assert torch.equal(found["second_moment"], found["hessian"].diagonal())
    moment = SecondMoment(columns=columns)
    moment.add(x)
    assert torch.allclose(moment.result()["second_moment"].double(), expected.diagonal(), rtol=1e-7)
    Stats(**found, n_tokens=collector.n_tokens, data_hash="")


def test_a_million_tokens_lose_nothing():
    """Values of one sign, whose sum grows without end: where a plain float32 sum over tokens is off by a percent."""
    x = torch.rand(10_000, 4, generator=dice()) + 1
    hessian, moment, cross = Hessian(columns=4), SecondMoment(columns=4), Cross(columns=4)
    for _ in range(100):
        hessian.add(x)
        moment.add(x)
        cross.add(2 * x, x)
    expected = x.double().T @ x.double() / len(x)
    assert scaled_error(hessian.result()["hessian"].double(), expected) < 1e-6
    assert scaled_error(cross.result()["cross"].double() / 2, expected) < 1e-6
    assert torch.allclose(moment.result()["second_moment"].double(), expected.diagonal(), rtol=1e-7)


def test_cross_has_the_original_in_its_rows():
    original, x = inputs(3000, 9), inputs(3000, 9, seed=5)
    collector = Cross(columns=9)
    collector.add(original, x)
    found = collector.result()["cross"].double()
    expected = original.double().T @ x.double() / 3000
    assert torch.allclose(found, expected, rtol=1e-4, atol=1e-3)
    assert not torch.allclose(found, expected.T, rtol=1e-2)


def test_fisher_is_the_weighted_hessian_of_each_run():
    x, g = (
        inputs(3000, 8),
        torch.randn(3000, 7, generator=dice(2)) * torch.rand(3000, 1, generator=dice(3)) * 1e-6,
    )
    collector = Fisher(columns=8, rows=7, runs=3)
    collector.add(x, g)
    found = collector.result()
    assert found["hessian"].shape == (3, 8, 8)
    for run, rows in enumerate((slice(0, 2), slice(2, 4), slice(4, 7))):  # 7 * run // 3
        s = g[:, rows].double().square().mean(1)
        expected = (x.double() * s.unsqueeze(1)).T @ x.double() / s.sum()
        assert scaled_error(found["hessian"][run].double(), expected) < 3e-6
        assert float(found["saliency"][run]) == pytest.approx(float(s.mean()), rel=1e-5)
    assert torch.allclose(found["second_moment"], found["hessian"].diagonal(dim1=1, dim2=2).mean(0))


def test_fisher_of_equal_gradients_is_the_hessian():
    x = inputs(2500, 8)
    hessian, fisher = Hessian(columns=8), Fisher(columns=8, rows=4, runs=2)
    hessian.add(x)
    fisher.add(x, torch.full((2500, 4), 1e-3))
    for run in fisher.result()["hessian"]:
        assert scaled_error(run.double(), hessian.result()["hessian"].double()) < 5e-6


def test_fisher_of_a_run_that_matters_nothing_is_zero():
    g = torch.ones(50, 4)
    g[:, 2:] = 0
    collector = Fisher(columns=3, rows=4, runs=2)
    collector.add(torch.ones(50, 3), g)
    found = collector.result()
    assert found["saliency"].tolist() == [1.0, 0.0]
    assert torch.equal(found["hessian"][1], torch.zeros(3, 3))
    with pytest.raises(ValueError, match="cannot be cut"):
        Fisher(columns=3, rows=4, runs=5)


def factor(n, seed):
    a = torch.randn(n, n, generator=dice(seed))
    return a @ a.T / n + 0.1 * torch.eye(n)


def direction(matrix):
    return matrix.double() / matrix.double().norm()


def test_planted_kronecker_factors_are_found():
    """With independent x and g the covariance of g x^T is the product of theirs, and one pass is enough."""
    inner, outer = factor(6, 1), factor(5, 2)
    x = torch.randn(200_000, 6, generator=dice(3)) @ torch.linalg.cholesky(inner).T
    g = torch.randn(200_000, 5, generator=dice(4)) @ torch.linalg.cholesky(outer).T * 1e-5
    collector = Kronecker(columns=6, rows=5)
    collector.add(x, g)
    found = collector.result()
    assert float((direction(found["hessian"]) - direction(inner)).norm()) < 0.02
    assert float((direction(found["output"]) - direction(outer)).norm()) < 0.02
    assert torch.allclose(found["hessian"].diagonal(), inner.diagonal(), rtol=0.03)  # a mean of x x^T
    assert float(found["output"].diagonal().mean()) == pytest.approx(1.0)
    identity = direction(torch.eye(6))
    assert float((direction(inner) - identity).norm()) > 0.2  # so that finding it is something


def nearest_product(x, g):
    """The best Kronecker product, by the singular vectors of the rearranged covariance (Van Loan and Pitsianis 1993)."""
    xx = torch.einsum("ti,tj->tij", x, x).flatten(1).double()
    gg = torch.einsum("ti,tj->tij", g, g).flatten(1).double()
    u, _, v = torch.linalg.svd(gg.T @ xx / len(x))
    return tuple(part.view(n, n) * part.view(n, n).trace().sign() for part, n in ((u[:, 0], 5), (v[0], 6)))


def test_passes_lead_to_the_nearest_kronecker_product():
    """Tokens of two kinds, so that no product is exact and the first pass is off."""
    kind = (torch.rand(4000, 1, generator=dice(5)) < 0.3).float()
    x = torch.randn(4000, 6, generator=dice(6)) @ factor(6, 1) * (1 + 3 * kind)
    x = x + 4 * kind * torch.randn(4000, 1, generator=dice(9)) * torch.eye(6)[0]
    g = torch.randn(4000, 5, generator=dice(7)) @ factor(5, 2) * (1 - 0.8 * kind)
    g = g + 2 * kind * torch.randn(4000, 1, generator=dice(10)) * torch.eye(5)[1]
    outer, inner = nearest_product(x, g)
    collector = Kronecker(columns=6, rows=5)
    errors = []
    for number in range(8):
        if number:
            collector.turn()
        collector.add(x, g)
        found = collector.result()
        errors.append(
            float((direction(found["hessian"]) - inner).norm() + (direction(found["output"]) - outer).norm())
        )
    assert errors[0] > 1e-2
    assert all(after < before for before, after in pairwise(errors[:4]))
    assert errors[-1] < 1e-4


def test_no_gradient_at_all_gives_zeros():
    collector = Kronecker(columns=6, rows=5)
    collector.add(torch.ones(10, 6), torch.zeros(10, 5))
    found = collector.result()
    assert not found["hessian"].any()
    assert not found["output"].any()
