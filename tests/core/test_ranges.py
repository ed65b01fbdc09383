"""Ranges against closed forms: uniform and normal values, planted outliers."""

import math

import numpy as np
import pytest
import torch

from poise.core.distribution import Samples
from poise.core.errors import UsageError
from poise.core.histogram import Histogram
from poise.core.ranges import RANGES, entropy_range, mse_range, percentile_range, range_by

N = 1_000_000


def normal_quantiles(n):
    """n values whose histogram is as normal as it can be."""
    return torch.special.ndtri((torch.arange(n, dtype=torch.float64) + 0.5) / n).float().view(1, -1)


def histogram(x, bins=8192):
    made = Histogram(len(x), bins)
    made.add(x)
    return made


def normal_error(clip, levels):
    """Mean squared error of a normal value on equal steps from -clip to clip, integrated in float64."""
    x = np.linspace(-9, 9, 200_001)
    step = 2 * clip / (levels - 1)
    nearest = np.clip(np.round((x + clip) / step), 0, levels - 1) * step - clip
    density = np.exp(-x * x / 2) / math.sqrt(2 * math.pi)
    return float(np.sum((x - nearest) ** 2 * density) * (x[1] - x[0]))


def best_normal_clip(levels):
    low, high = 0.5, 6.0
    for _ in range(40):  # golden section: the error has one minimum
        a, b = high - 0.618034 * (high - low), low + 0.618034 * (high - low)
        low, high = (low, b) if normal_error(a, levels) < normal_error(b, levels) else (a, high)
    return (low + high) / 2


MAX = {2: 1.5 * 0.9957, 3: 3.5 * 0.5860, 4: 7.5 * 0.3352, 8: 3.92}
"""Max (1960), table II: the optimal step of uniform quantizers, times the outermost level; 8 bits by integration."""


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_the_best_clip_of_normal_values_is_that_of_theory(bits):
    theory = best_normal_clip(2**bits)
    assert theory == pytest.approx(MAX[bits], rel=5e-3)
    found = mse_range(histogram(normal_quantiles(N)), 2**bits, symmetric=True)
    assert found.high.item() == pytest.approx(theory, rel=0.01)
    assert normal_error(found.high.item(), 2**bits) < 1.0005 * normal_error(theory, 2**bits)
    lopsided = mse_range(histogram(5 * normal_quantiles(N) + 40), 2**bits, symmetric=False)
    # The optimum is flat: what counts is the error there.
    clip = (lopsided.high - lopsided.low).item() / 10
    assert lopsided.low.item() == pytest.approx(40 - 5 * theory, abs=0.4)
    assert normal_error(clip, 2**bits) < 1.003 * normal_error(theory, 2**bits)


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_uniform_values_need_all_of_their_range(bits):
    """The best levels are the middles of 2^bits equal parts: the outermost is (1 - 2^-bits) of the way out."""
    x = ((torch.arange(N) + 0.5) / N * 2 - 1).view(1, -1)
    found = mse_range(histogram(x), 2**bits, symmetric=True)
    assert found.high.item() == pytest.approx(1 - 2.0**-bits, rel=5e-3)
    assert entropy_range(histogram(x), 8, symmetric=True).high.item() == pytest.approx(1.0, rel=0.02)


def test_values_on_a_grid_get_their_grid():
    x = torch.tensor([[-3.0, -1.0, 1.0, 3.0] * 50])
    for source in (Samples(x), Samples(x + 7)):
        found = mse_range(source, 4, symmetric=False)
        assert source.error(*found, 4).item() < 1e-4
    assert mse_range(Samples(x), 4, symmetric=True).high.item() == pytest.approx(3.0, rel=2e-3)


def test_one_outlier_is_cut_off_by_mse_and_entropy():
    bulk = torch.randn(1, 100_000, generator=torch.Generator().manual_seed(0))
    x = torch.cat((bulk, torch.tensor([[100.0]])), dim=1)
    made = histogram(x)
    assert mse_range(made, 16, symmetric=True).high.item() < 12
    assert 2.5 < entropy_range(made, 8, symmetric=True).high.item() < 10
    assert percentile_range(made, 99.9, symmetric=True).high.item() == pytest.approx(
        np.percentile(x.abs().double(), 99.9), abs=128 / 8192
    )


def test_entropy_takes_most_of_normal_values():
    found = entropy_range(histogram(normal_quantiles(N)), 8, symmetric=True).high.item()
    assert 3.0 < found <= 5.0


def test_entropy_is_the_textbooks_divergence():
    """Against the loop over bins as it is usually written, at every threshold it could choose."""
    generator = torch.Generator().manual_seed(3)
    x = (torch.randn(1, 3000, generator=generator) * torch.rand(1, 3000, generator=generator)).abs()
    made = histogram(x, bins=64)
    sizes = made.sizes()[0].double().numpy()
    sizes[0] = min(sizes[0], sizes[1])
    scores = {}
    for edge in range(2, 65):
        p = sizes[:edge].copy()
        p[-1] += sizes[edge:].sum()
        q = np.zeros(edge)
        owner = np.arange(edge) * min(8, edge) // edge
        for run in range(8):
            here = (owner == run) & (sizes[:edge] > 0)
            if here.any():
                q[here] = sizes[:edge][owner == run].sum() / here.sum()
        p, q = p / p.sum(), q / q.sum()
        with np.errstate(divide="ignore", invalid="ignore"):
            scores[edge] = np.where(p > 0, p * np.log(p / q), 0.0).sum()
    best = min(scores, key=scores.get)
    expected = min(best * made.width.item(), x.max().item())
    assert entropy_range(made, 4, symmetric=True).high.item() == pytest.approx(expected)


def test_relu_outputs_keep_their_zero():
    x = torch.randn(1, 100_000, generator=torch.Generator().manual_seed(0)).relu()
    for name in RANGES[1:]:
        low, high = range_by(name, histogram(x), bits=8, symmetric=False)
        assert low.item() == pytest.approx(0, abs=0.02), name
        assert 2.5 < high.item() <= x.max().item(), name


@pytest.mark.parametrize("name", RANGES)
def test_ranges_scale_with_the_values_and_channels_do_not_meet(name):
    generator = torch.Generator().manual_seed(4)
    x = torch.randn(2, 4000, generator=generator) / torch.rand(2, 4000, generator=generator).clamp(0.1)
    x[1] *= 32
    both = range_by(name, histogram(x, 512), bits=4)
    for index in range(2):
        alone = range_by(name, histogram(x[index : index + 1] / 8, 512), bits=4)
        assert torch.equal(both.high[index : index + 1] / 8, alone.high)
        assert torch.equal(both.low[index : index + 1] / 8, alone.low)


@pytest.mark.parametrize("name", RANGES)
@pytest.mark.parametrize("symmetric", [True, False])
def test_constants_and_single_values_have_ranges(name, symmetric):
    for x in (torch.zeros(2, 5), torch.full((2, 7), -3.0), torch.tensor([[1.0], [1e-30]])):
        for source in (Samples(x), histogram(x, 512)):
            found = range_by(name, source, bits=4, symmetric=symmetric)
            assert bool(torch.isfinite(torch.stack(found)).all())
            assert bool((found.low <= found.high).all())


def test_unknown_ranges_are_refused():
    with pytest.raises(UsageError, match="no range named 'median': there is absmax"):
        range_by("median", Samples(torch.ones(1, 1)), bits=4)
