"""Statistics that keep their word, by simulation: errors at the stated rates, intervals that cover."""

import functools

import numpy as np
import pytest
from scipy.stats import binom

from poise.core.verdict import FAIL, PASS, Range
from poise.statistics.flips import flips
from poise.statistics.noninferiority import Question, detectable, judge
from poise.statistics.partition import Partition, log_mean_ratio, mean

RUNS = 400


def most(rate: float) -> float:
    """Share of RUNS that a true rate exceeds once in a thousand."""
    return binom.ppf(0.999, RUNS, rate) / RUNS


def clustered(generator, documents, each, within):
    """Normal samples of documents of unequal length with a part in common; mean 0."""
    sizes = generator.integers(1, 2 * each, documents)
    names = np.repeat(np.arange(documents), sizes)
    common = generator.normal(0, within, documents)[names]
    return names.astype(str).tolist(), common + generator.normal(0, 1, len(names))


@pytest.mark.parametrize(("documents", "each", "within"), [(8, 4, 1.0), (40, 6, 0.5), (40, 1, 0.0)])
def test_intervals_cover_at_their_rate_with_clustered_samples(documents, each, within):
    generator, missed = np.random.default_rng(0), 0
    for run in range(RUNS):
        names, samples = clustered(generator, documents, each, within)
        low, high = Partition(names, seed=run).estimate(samples, mean).interval(0.95)
        missed += not low <= 0 <= high
    assert missed / RUNS <= most(0.06)
    assert missed / RUNS >= 0.015  # nor are they far too wide


def test_intervals_of_single_samples_would_not():
    """What clustering is for."""
    generator, missed = np.random.default_rng(0), 0
    for run in range(RUNS):
        names, samples = clustered(generator, 8, 4, 1.0)
        alone = [f"{name}/{number}" for number, name in enumerate(names)]
        low, high = Partition(alone, seed=run).estimate(samples, mean).interval(0.95)
        missed += not low <= 0 <= high
    assert missed / RUNS > 0.15


def accuracy(generator, items, flipped, lost):
    """Paired right and wrong with a true loss; every fourth item shares a passage with its neighbours."""
    worse, better = (flipped + lost) / 2, (flipped - lost) / 2
    kind = generator.choice(3, size=items, p=[worse, better, 1 - worse - better])
    same = (generator.random(items) < 0.6).astype(float)
    original = np.where(kind == 0, 1.0, np.where(kind == 1, 0.0, same))
    candidate = np.where(kind == 0, 0.0, np.where(kind == 1, 1.0, same))
    return original, candidate


@functools.cache
def in_pairs(items):
    """Draws do not depend on the data, so runs may share them."""
    return Partition([str(number // 2) for number in range(items)])


def verdict_of(original, candidate, margin=0.01):
    estimate = in_pairs(len(original)).estimate(candidate - original, mean, share=True)
    (finding,) = judge({"accuracy": Question(estimate=estimate, allowed=Range(at_least=-margin))})
    return finding


@pytest.mark.parametrize(("items", "flipped"), [(200, 0.04), (1000, 0.05), (2000, 0.1)])
def test_a_pass_at_the_margin_is_wrong_in_at_most_five_per_cent(items, flipped):
    generator = np.random.default_rng(1)
    passed = sum(verdict_of(*accuracy(generator, items, flipped, 0.01)).verdict == PASS for _ in range(RUNS))
    assert passed / RUNS <= most(0.05)


def test_a_fail_inside_the_margin_is_wrong_in_at_most_five_per_cent():
    generator = np.random.default_rng(2)
    failed = sum(verdict_of(*accuracy(generator, 1000, 0.05, 0.01)).verdict == FAIL for _ in range(RUNS))
    assert failed / RUNS <= most(0.05)


def test_a_planted_loss_is_caught_at_the_stated_power():
    """2 points beyond the margin, with as many items as the stated power takes."""
    generator = np.random.default_rng(3)
    items = 1100
    findings = [verdict_of(*accuracy(generator, items, 0.07, 0.03)) for _ in range(RUNS)]
    stated = np.median([finding.detectable for finding in findings])
    assert stated == pytest.approx(-0.03, abs=0.004)
    caught = np.mean([finding.verdict == FAIL for finding in findings])
    assert 0.7 <= caught <= 0.95


def test_as_many_samples_as_were_advised_decide():
    generator = np.random.default_rng(4)
    original, candidate = accuracy(generator, 600, 0.06, 0.0)
    more = verdict_of(original, candidate).more
    assert more is not None
    value = float(np.mean(candidate - original))
    decided = 0
    for _ in range(100):
        decided += verdict_of(*accuracy(generator, 600 + more, 0.06, -value)).verdict == PASS
    assert 65 <= decided <= 95


def test_a_ratio_of_speeds_is_judged_on_its_logarithm():
    generator = np.random.default_rng(5)
    first = generator.lognormal(0, 0.3, 300)
    pair = np.column_stack([first, first * 1.1 * generator.lognormal(0, 0.05, 300)])
    estimate = Partition([str(i) for i in range(300)]).estimate(pair, log_mean_ratio)
    question = Question(estimate=estimate, allowed=Range(at_most=1.05), ratio=True)
    (finding,) = judge({"latency": question})
    assert finding.verdict == FAIL
    assert finding.low < 1.1 < finding.high or finding.value == pytest.approx(1.1, rel=0.02)
    assert np.exp(detectable(question)) > 1.05


def test_no_difference_in_ten_items_is_not_enough():
    finding = verdict_of(np.ones(10), np.ones(10))
    assert finding.verdict == "inconclusive"
    assert finding.more > 100


def test_two_ends_need_both():
    names = [str(i) for i in range(200)]
    inside = np.random.default_rng(6).normal(1.0, 0.1, 200)
    for shift, expected in ((0.0, PASS), (0.3, FAIL), (-0.3, FAIL)):
        estimate = Partition(names).estimate(inside + shift, mean)
        (finding,) = judge({"x": Question(estimate=estimate, allowed=Range(at_least=0.9, at_most=1.1))})
        assert finding.verdict == expected


def test_holm_keeps_twenty_harmless_figures_from_failing_one():
    """Each on its limit: one in 20 would fail by chance."""
    names = [str(i) for i in range(100)]
    generator, failed, partition = np.random.default_rng(7), 0, Partition(names)
    for _ in range(80):
        questions = {
            str(k): Question(
                estimate=partition.estimate(generator.normal(0, 1, 100), mean), allowed=Range(at_most=0.0)
            )
            for k in range(20)
        }
        failed += any(finding.verdict == FAIL for finding in judge(questions))
    assert failed / 80 <= binom.ppf(0.999, 80, 0.05) / 80


def test_flips_in_both_directions_with_the_exact_p_value():
    original = [1] * 12 + [0] * 12
    candidate = [0] * 9 + [1] * 3 + [1] * 2 + [0] * 10
    found = flips(original, candidate)
    assert (found.n, found.lost, found.won) == (24, 9, 2)
    assert found.p == pytest.approx(2 * binom.cdf(2, 11, 0.5))
    assert flips([1, 0], [1, 0]).p == 1.0


def test_what_gave_no_number_is_counted_and_never_passes():
    samples = np.array([0.0] * 50 + [np.nan])
    estimate = Partition([str(i) for i in range(51)]).estimate(samples, mean)
    assert (estimate.n, estimate.missing) == (50, 1)
    (finding,) = judge({"kl": Question(estimate=estimate, allowed=Range(at_most=1.0))})
    assert finding.verdict == "inconclusive"
    assert "1 of 51" in finding.reason


def test_draws_and_so_errors_are_the_same_every_time_and_for_every_metric():
    names = [str(i % 7) for i in range(40)]
    samples = np.random.default_rng(8).normal(size=40)
    a, b = (Partition(names, seed=3).estimate(samples, mean) for _ in range(2))
    assert a == b
    order = np.random.default_rng(9).permutation(40)
    shuffled = Partition([names[i] for i in order], seed=3).estimate(samples[order], mean)
    assert shuffled.error == pytest.approx(a.error, rel=1e-12)


def test_a_wild_ratio_has_an_interval_without_end_and_no_crash():
    rows = np.column_stack([np.ones(2), np.array([1.0, 1e300])])
    estimate = Partition(["a", "b"]).estimate(np.log(rows[:, 1]), mean)
    (finding,) = judge({"x": Question(estimate=estimate, allowed=Range(at_most=1.02), ratio=True)})
    assert finding.high == np.inf
    assert finding.verdict == "inconclusive"


def test_one_document_has_no_interval_whatever_the_limits():
    estimate = Partition(["a", "a"]).estimate(np.array([0.2, 0.4]), mean)
    low, high = estimate.interval(0.95, 0.0, 1.0)
    assert np.isnan(low)
    assert np.isnan(high)
    (finding,) = judge({"x": Question(estimate=estimate, allowed=Range(at_most=1.0))})
    assert "one document" in finding.reason
