"""Metrics of generated text against their libraries and against cases worked out by hand."""

import math

import pytest
import torch

from poise.core.metric import Answer, AnswerMetric
from poise.core.registry import get, names

NAMES = [name for name in names("metric") if issubclass(get("metric", name), AnswerMetric)]
ANSWERS = ["The cat sat on the mat.", "A dog barked at the cat", "It rained all day long, again.", "Yes"]
WANTED = [
    "The cat sat down on the mat.",
    "The dog barked at a cat.",
    "It was raining all the day.",
    "Yes, it is.",
]


def words(text, ended=True):
    return Answer(text=text, tokens=tuple(hash(word) % 1000 for word in text.split()), ended=ended)


def scored(name, answers, others):
    """The score of a few answers, as a run computes it."""
    metric = get("metric", name)()
    rows = torch.tensor(
        [metric.columns(a, b) for a, b in zip(answers, others, strict=True)], dtype=torch.float64
    )
    return float(metric.combine(rows.sum(0), torch.tensor(float(len(rows)), dtype=torch.float64)))


def test_bleu_is_that_of_sacrebleu():
    from sacrebleu.metrics import BLEU

    expected = BLEU().corpus_score(ANSWERS, [WANTED]).score
    assert scored("bleu", map(words, ANSWERS), map(words, WANTED)) == pytest.approx(expected, rel=1e-9)
    assert 10 < expected < 60


def test_bleu_without_a_match_is_smoothed_as_sacrebleu_smooths():
    from sacrebleu.metrics import BLEU

    answers, wanted = ["a b c d e f", "g h i j"], ["a x c y e z", "g q i r"]
    expected = BLEU().corpus_score(answers, [wanted]).score
    assert scored("bleu", map(words, answers), map(words, wanted)) == pytest.approx(expected, rel=1e-9)


def test_chrf_is_the_mean_of_sacrebleu():
    from sacrebleu.metrics import CHRF

    expected = sum(CHRF().sentence_score(a, [b]).score for a, b in zip(ANSWERS, WANTED, strict=True)) / 4
    assert scored("chrf", map(words, ANSWERS), map(words, WANTED)) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize(
    ("name", "kind"), [("rouge1", "rouge1"), ("rouge2", "rouge2"), ("rouge-l", "rougeL")]
)
def test_rouge_is_that_of_rouge_score(name, kind):
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer([kind], use_stemmer=True)
    expected = 25 * sum(scorer.score(b, a)[kind].fmeasure for a, b in zip(ANSWERS, WANTED, strict=True))
    assert scored(name, map(words, ANSWERS), map(words, WANTED)) == pytest.approx(expected, rel=1e-9)


def test_rouge_has_no_number_for_letters_that_it_does_not_read():
    assert math.isnan(scored("rouge1", [words("кот")], [words("кот")]))


@pytest.mark.parametrize(
    ("name", "answer", "other", "expected"),
    [
        ("identical", words("a b"), words("a b"), 1.0),
        ("identical", words("a b"), words("a c"), 0.0),
        ("identical", words("a b"), words("a b", ended=False), 0.0),
        ("divergence", words("a b c d"), words("a b x d"), 2.0),
        ("divergence", words("a b"), words("a b c"), 2.0),
        ("length", words("a b c"), words("a"), 3.0),
        ("endless", words("a", ended=False), words("a"), 1.0),
        ("endless", words("a"), words("a"), 0.0),
        ("loops", words("so " + "it goes " * 4), words(""), 1.0),
        ("loops", words("so " + "it goes " * 3), words(""), 0.0),
        ("loops", words("no no no no yes"), words(""), 0.0),
        ("broken-tags", words("<think>so</think> yes"), words(""), 0.0),
        ("broken-tags", words("<think>so"), words(""), 1.0),
        ("broken-tags", words("so</think>"), words(""), 1.0),
        ("broken-tags", words("yes<|im_end|>"), words(""), 1.0),
        ("broken-tags", words("1 < 2 and 3 > 2"), words(""), 0.0),
        ("surprise", Answer(text="a", surprise=1.5), words(""), 1.5),
        ("relevance", Answer(text="a", surprise=1.5, elsewhere=4.0), words(""), 2.5),
        ("self-bleu", words("the cat sat on the mat"), words("the cat sat on the mat"), 100.0),
        ("distinct", words("a b a b a b a b a"), words(""), 2 / 8),
        ("distinct", words("a b c d e f g h"), words(""), 1.0),
    ],
)
def test_by_hand(name, answer, other, expected):
    assert scored(name, [answer], [other]) == pytest.approx(expected)


def test_repetition_compresses():
    varied = "Whales breathe air, sing in the deep and travel from ocean to ocean every single year."
    assert scored("compression", [words("again and " * 40)], [words("")]) > 4
    assert scored("compression", [words(varied)], [words("")]) < 1.3


def test_short_text_has_no_variety_to_speak_of():
    assert math.isnan(scored("distinct", [words("a b c")], [words("")]))


@pytest.mark.parametrize("name", NAMES)
def test_an_empty_answer_is_no_crash(name):
    assert len(get("metric", name)().columns(Answer(text=""), words("a"))) >= 1
