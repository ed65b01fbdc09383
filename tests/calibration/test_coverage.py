"""Starved experts: counted, reported, and drawn towards their layer by the stated rule."""

import pytest
import torch

from poise.calibration.coverage import Coverage, feed, pooled, shrunk
from poise.core.errors import PoiseError
from poise.core.stats import Stats


def stats(x, hessian=True):
    h = x.T @ x / len(x)
    return Stats(second_moment=h.diagonal(), n_tokens=len(x), data_hash="h", hessian=h if hessian else None)


def layer(counts=(900, 400, 6, 0)):
    """Experts that read samples of one distribution."""
    x = torch.randn(sum(counts), 5, generator=torch.Generator().manual_seed(0)) @ torch.diag(
        torch.arange(1.0, 6)
    )
    parts = x.split(list(counts))
    return x, {f"experts.{i}": stats(part) if len(part) else None for i, part in enumerate(parts)}


def test_counts_and_report():
    coverage = Coverage(tokens={"a": 100, "b": 3, "c": 0}, least=20)
    assert list(coverage.starved.items()) == [("c", 0), ("b", 3)]
    assert "2 of 3 experts were reached by fewer than 20 tokens" in coverage.report()
    assert coverage.report().endswith("c 0, b 3")
    assert Coverage(tokens={"a": 20}, least=20).report() == ""


def test_the_pool_is_what_all_have_read():
    x, experts = layer()
    pool, whole = pooled(experts), stats(x)
    assert pool.n_tokens == 1306
    assert torch.allclose(pool.hessian, whole.hessian, rtol=1e-5, atol=1e-4)
    assert torch.allclose(pool.second_moment, whole.second_moment, rtol=1e-5)
    assert pool.data_hash == "h"


def test_the_rule_is_n_over_n_plus_n0():
    _, experts = layer()
    own, pool = experts["experts.2"], pooled(experts)
    found = shrunk(own, pool, 18)
    assert torch.allclose(found.hessian, 0.25 * own.hessian + 0.75 * pool.hessian)
    assert torch.allclose(found.second_moment, 0.25 * own.second_moment + 0.75 * pool.second_moment)
    assert found.n_tokens == 6
    assert torch.equal(shrunk(own, pool, 0).hessian, own.hessian)
    assert torch.equal(shrunk(None, pool, 18).hessian, pool.hessian)
    assert shrunk(None, pool, 18).n_tokens == 0


def test_well_fed_experts_keep_their_own_and_all_others_get_some():
    _, experts = layer()
    before = {name: item.hessian.clone() for name, item in experts.items() if item is not None}
    filled, coverage = feed(experts, least=20)
    assert list(filled) == list(experts)
    assert coverage.starved == {"experts.3": 0, "experts.2": 6}
    assert filled["experts.0"] is experts["experts.0"]
    assert torch.equal(filled["experts.2"].hessian, shrunk(experts["experts.2"], pooled(experts), 14).hessian)
    assert torch.linalg.matrix_rank(filled["experts.3"].hessian) == 5
    assert all(torch.equal(item.hessian, before[name]) for name, item in experts.items() if item is not None)


def test_the_pool_fades_out_as_an_expert_comes_to_its_least():
    """With 19 of 20 tokens the pool is worth one token, so that there is no jump."""
    _, experts = layer((900, 19))
    filled, _ = feed(experts, least=20)
    own = experts["experts.1"].hessian
    expected = own + (pooled(experts).hessian - own) / 20
    assert torch.allclose(filled["experts.1"].hessian, expected, atol=1e-5)


def test_shrinking_brings_starved_experts_nearer_to_the_truth():
    truth = torch.diag(torch.arange(1.0, 6).square())
    _, experts = layer((2000, 2000, *[8] * 40))
    filled, _ = feed(experts, least=20)

    def error(stats):
        return float(sum((stats[f"experts.{i}"].hessian - truth).norm() for i in range(2, 42)))

    assert error(filled) < 0.6 * error(experts)


def test_a_matrix_that_some_expert_lacks_is_left_out():
    x = torch.randn(50, 5)
    pool = pooled({"a": stats(x), "b": stats(x, hessian=False)})
    assert pool.hessian is None
    assert pool.second_moment is not None


def test_a_layer_without_tokens_is_an_error():
    with pytest.raises(PoiseError, match="no token of the calibration text has reached an expert of a, b"):
        feed({"a": None, "b": None}, least=4)
