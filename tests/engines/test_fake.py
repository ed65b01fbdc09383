"""The fake engine says what its header promises."""

import math

import pytest
import torch

from poise.core.errors import UsageError
from poise.core.registry import build, spec_of
from poise.engines.fake import STEP, Fake


def perplexity(engine, tokens):
    surprise = -torch.log_softmax(engine.logits(tokens)[:-1].double(), -1)
    return math.exp(surprise[torch.arange(len(tokens) - 1), torch.tensor(tokens[1:])].mean())


def test_without_a_bias_every_text_has_the_perplexity_of_the_vocabulary():
    engine = Fake(vocabulary=50)
    assert engine.logits([3, 1, 4]).shape == (3, 50)
    assert engine.logits([3, 1, 4]).dtype == torch.float32
    assert perplexity(engine, [3, 1, 4, 1, 5]) == pytest.approx(50)


@pytest.mark.parametrize("bias", [-1.5, 0.0, 2.0])
def test_counting_text_has_the_perplexity_of_the_header(bias):
    engine = Fake(vocabulary=8, bias=bias)
    expected = (math.exp(bias) + 8 - 1) / math.exp(bias)
    assert perplexity(engine, [5, 6, 7, 0, 1, 2]) == pytest.approx(expected)


def test_it_counts_on_and_claims_steady_steps():
    made = Fake(vocabulary=8, bias=1.0).generate([1, 6], 4)
    assert made.tokens == [7, 0, 1, 2]
    assert made.seconds == pytest.approx([STEP, 2 * STEP, 3 * STEP, 4 * STEP])
    assert Fake().generate([1, 6], 0).tokens == []


def test_no_text_has_no_scores():
    assert Fake().logits([]).shape == (0, 32)


def test_it_is_found_by_name_and_stands_in_for_every_engine():
    with build("engine", "fake(vocabulary=9, bias=0.5)") as engine:
        engine.load(None)
        assert spec_of(engine) == "fake(vocabulary=9, bias=0.5)"
        assert engine.reads == ("huggingface", "gguf")
    engine.close()


def test_nonsense_is_refused():
    with pytest.raises(UsageError, match="vocabulary of at least 1, got 0"):
        Fake(vocabulary=0)
