"""Metrics that compare logits, against figures worked out by hand."""

import math

import pytest
import torch

from poise.core.metric import AnswerMetric, LogitMetric, Metric, SystemMetric
from poise.core.registry import get, names
from poise.engines.fake import Fake
from poise.metrics.kl import Kl
from poise.metrics.perplexity import Perplexity
from poise.metrics.perplexity_ratio import PerplexityRatio
from poise.metrics.top1 import Top1

LOGIT_METRICS = [name for name in names("metric") if issubclass(get("metric", name), LogitMetric)]


def log(*probabilities):
    return torch.tensor([probabilities]).log()


def sampled(metric, p, q, tokens):
    """A window's score, of logits."""
    return metric.sample(p.log_softmax(-1), q.log_softmax(-1), tokens)


def measured(metric, *windows):
    """The text's value for windows of (reference, candidate, tokens)."""
    return metric.score("name", [sampled(metric, *window) for window in windows], "windows").value


@pytest.mark.parametrize("name", names("metric"))
def test_every_metric_says_what_it_measures_and_how(name):
    metric = get("metric", name)
    assert issubclass(metric, Metric)
    assert sum(issubclass(metric, kind) for kind in (LogitMetric, AnswerMetric, SystemMetric)) == 1
    assert metric.unit
    assert metric.protocol
    assert isinstance(metric.lower_is_better, bool)
    metric()


@pytest.mark.parametrize("name", LOGIT_METRICS)
def test_every_metric_ignores_a_constant_added_to_all_logits(name):
    metric, generator = get("metric", name)(), torch.Generator().manual_seed(0)
    p, q = torch.randn(2, 6, 11, generator=generator)
    tokens = torch.randint(11, (6,), generator=generator)
    shifted = sampled(metric, p + 3, q - 2, tokens)
    assert sampled(metric, p, q, tokens) == pytest.approx(shifted, abs=1e-5)


@pytest.mark.parametrize("name", LOGIT_METRICS)
def test_logits_that_are_no_numbers_give_no_number(name):
    p = torch.zeros(3, 5)
    q = p.clone()
    q[1, 2] = math.nan
    assert math.isnan(sampled(get("metric", name)(), p, q, torch.tensor([2, 2, 2])))


def test_uniform_logits_have_the_perplexity_of_the_vocabulary():
    logits = torch.full((5, 37), 0.3)
    assert measured(Perplexity(), (logits, logits, torch.arange(5))) == pytest.approx(37, rel=1e-6)


@pytest.mark.parametrize("bias", [-1.0, 0.0, 2.5])
def test_counting_text_has_the_perplexity_of_the_fake_engine(bias):
    tokens = list(range(10, 30))
    logits = Fake(vocabulary=32, bias=bias).logits(tokens)[:-1]
    expected = (math.exp(bias) + 31) / math.exp(bias)
    assert measured(Perplexity(), (logits, logits, torch.tensor(tokens[1:]))) == pytest.approx(expected)


def test_perplexity_is_the_exponential_of_a_mean_and_not_a_mean_of_exponentials():
    score = Perplexity().score("perplexity", [1.0, 3.0], "windows")
    assert score.value == pytest.approx(math.exp(2))


def test_perplexity_reads_the_candidate_and_the_token_that_followed():
    candidate = log(0.5, 0.25, 0.25)
    assert measured(Perplexity(), (log(0.1, 0.1, 0.8), candidate, torch.tensor([1]))) == pytest.approx(4)


def test_kl_of_equal_models_is_zero():
    p = torch.randn(7, 300, generator=torch.Generator().manual_seed(1))
    assert measured(Kl(), (p, p.clone(), torch.arange(7))) == pytest.approx(0, abs=1e-7)


def test_kl_is_from_the_reference_to_the_candidate():
    p, q = (0.7, 0.2, 0.1), (0.1, 0.3, 0.6)
    forth = sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))
    back = sum(b * math.log(b / a) for a, b in zip(p, q, strict=True))
    assert abs(forth - back) > 0.05
    assert sampled(Kl(), log(*p), log(*q), torch.tensor([0])) == pytest.approx(forth, rel=1e-5)


def test_kl_is_a_mean_over_positions_of_sums_over_the_vocabulary():
    p = torch.cat([log(0.5, 0.5), log(0.9, 0.1)])
    q = torch.cat([log(0.5, 0.5), log(0.5, 0.5)])
    second = 0.9 * math.log(0.9 / 0.5) + 0.1 * math.log(0.1 / 0.5)
    assert sampled(Kl(), p, q, torch.tensor([0, 0])) == pytest.approx(second / 2, rel=1e-5)


def test_top1_counts_positions_of_equal_choice():
    p = torch.tensor([[3.0, 1, 2], [0, 5, 1], [1, 2, 3], [9, 1, 1]])
    q = torch.tensor([[0.3, 0.1, 0.2], [5, 0, 1], [-3, -2, -1], [0, 1, 0]])
    assert sampled(Top1(), p, q, torch.zeros(4, dtype=torch.long)) == 0.5
    assert Top1.lower_is_better is False


def test_ratio_is_candidate_over_reference():
    p, q = log(0.5, 0.5), log(0.25, 0.75)
    assert measured(PerplexityRatio(), (p, q, torch.tensor([0]))) == pytest.approx(2)
    assert measured(PerplexityRatio(), (q, p, torch.tensor([0]))) == pytest.approx(0.5)


def test_ratio_is_the_quotient_of_both_perplexities():
    generator = torch.Generator().manual_seed(2)
    windows = [
        (*torch.randn(2, 5, 9, generator=generator), torch.randint(9, (5,), generator=generator))
        for _ in range(4)
    ]
    after = measured(Perplexity(), *windows)
    before = measured(Perplexity(), *((p, p, tokens) for p, _, tokens in windows))
    assert measured(PerplexityRatio(), *windows) == pytest.approx(after / before)


@pytest.mark.parametrize("name", LOGIT_METRICS)
def test_the_interval_holds_the_value_and_is_the_same_every_time(name):
    metric = get("metric", name)()
    samples = torch.rand(12, generator=torch.Generator().manual_seed(3)).tolist()
    score = metric.score("name", samples, "twelve windows")
    assert score.low < score.value < score.high
    assert metric.score("name", samples, "twelve windows") == score
    assert metric.score("name", samples, "twelve windows", seed=1).value == score.value
    assert (score.n, score.n_unscored, score.unit) == (12, 0, metric.unit)
    assert score.protocol == f"{metric.protocol}, twelve windows"


def test_the_interval_is_that_of_a_mean():
    """Of 400 normal samples: 1.96 standard errors to either side."""
    samples = torch.randn(400, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
    score = Kl().score("kl", samples.tolist(), "windows")
    half = 1.96 * float(samples.std()) / 20
    assert score.high - score.value == pytest.approx(half, rel=0.1)
    assert score.value - score.low == pytest.approx(half, rel=0.1)


def test_one_sample_has_no_interval():
    score = Kl().score("kl", [0.25], "one window")
    assert (score.value, score.n) == (0.25, 1)
    assert math.isnan(score.low)
    assert math.isnan(score.high)


def test_windows_without_a_number_are_counted_and_left_out():
    score = Kl().score("kl", [1.0, math.nan, 3.0, math.inf], "windows")
    assert (score.value, score.n, score.n_unscored) == (2.0, 2, 2)


def test_nothing_scored_is_not_a_number():
    score = Kl().score("kl", [math.nan, math.nan], "windows")
    assert math.isnan(score.value)
    assert (score.n, score.n_unscored) == (0, 2)
