"""Shared passages are found whatever stands around them; texts of one language share next to none."""

import random

import numpy as np
import pytest

from poise.calibration import overlap as module
from poise.calibration.overlap import fingerprint, overlap
from poise.calibration.text import load_text


def prose(seed, words=4000):
    dice = random.Random(seed)
    return " ".join(f"w{dice.randrange(3000)}" for _ in range(words))


def test_the_built_in_texts_share_nothing():
    texts = [load_text(None, purpose).content for purpose in ("calibration", "evaluation")]
    assert overlap([texts[1]], fingerprint([texts[0]])) == 0.0
    assert overlap([texts[0]], fingerprint([texts[0]])) == 1.0


@pytest.mark.parametrize("share", [0.1, 0.5])
def test_a_planted_passage_is_measured(share):
    known, other = prose(0), prose(1)
    words = known.split()
    passage = " ".join(words[500 : 500 + int(share * len(words))])
    mixed = other[: len(other) // 2] + " " + passage + " " + other[len(other) // 2 :]
    expected = share / (1 + share)
    assert overlap([mixed], fingerprint([known])) == pytest.approx(expected, abs=0.02)


def test_case_and_punctuation_do_not_hide_it():
    known = prose(0, 200)
    assert overlap([known.upper().replace(" ", ",\n")], fingerprint([known])) == 1.0


def test_a_full_fingerprint_is_a_fair_sample(monkeypatch):
    known, other = prose(0), prose(1)
    half = known[: len(known) // 2] + " " + other[len(other) // 2 :]
    whole = overlap([half], fingerprint([known]))
    monkeypatch.setattr(module, "MOST", 500)
    small = fingerprint([known])
    assert len(small) == 500
    assert bool((np.diff(small) > 0).all())
    assert overlap([half], small) == pytest.approx(whole, abs=0.08)


def test_texts_too_short_for_a_run_share_nothing():
    assert overlap(["a b c"], fingerprint(["a b c"])) == 0.0
