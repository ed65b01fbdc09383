"""Text that a model writes itself: exact windows, its own distribution, reproducible."""

import itertools

import pytest
import torch

from poise.calibration.generated import HOT, write_windows
from poise.checkpoints import open_checkpoint
from poise.core.registry import get


def write(begin, **changes):
    settings = {"windows": 5, "length": 12, "opening": [1], "banned": [0, 2], "vocabulary": 50, "seed": 0}
    return write_windows(begin, progress=lambda *_: None, **{**settings, **changes})


def successor():
    """A model that is almost sure that the next token is one larger."""

    def advance(new):
        scores = torch.zeros(len(new), 50)
        scores[torch.arange(len(new)), (new[:, -1] + 1) % 50] = 30.0
        return scores

    return advance


def test_windows_are_exact_and_never_hold_what_ends_a_text():
    found = write(lambda: lambda new: torch.zeros(len(new), 50), windows=70)
    assert len(found) == 70
    for window in found:
        assert len(window) == 12
        assert window[0] == 1
        assert not {0, 2} & set(window[1:])


def test_texts_follow_the_model():
    for window in write(successor, length=30, windows=40):
        steps = [b - a for a, b in itertools.pairwise(window) if b > 3]
        assert sum(step == 1 for step in steps) > 0.85 * len(steps)


def test_texts_begin_differently_and_equal_seeds_write_the_same():
    first = write(successor, windows=40)
    assert first == write(successor, windows=40)
    assert first != write(successor, windows=40, seed=1)
    assert len({window[1] for window in first}) > 15
    assert HOT > 1


def test_texts_go_on_from_passages_in_turn():
    passages = [[7, 20, 21], [3, 30, 31], [9, 40, 41]]
    found = write(successor, passages=passages, windows=40)
    assert [window[:3] for window in found] == [passages[text % 3] for text in range(40)]
    follows = [window[3] == window[2] + 1 for window in found]
    assert all(follows), "no token is drawn from a flat distribution"


@pytest.mark.parametrize("name", ["llama", "gemma3_text", "gpt2"])
def test_the_engine_continues_its_own_texts(model_factory, name):
    """With its cache it gives the scores that it gives without."""
    with get("engine", "torch")(dtype="float32") as engine:
        engine.load(open_checkpoint(model_factory(name)))
        advance = engine.writer()
        text = [[5, 9, 30], [7, 8, 9]]
        advance(torch.tensor(text))
        for number, token in enumerate((11, 12, 13), 1):
            scores = advance(torch.tensor([[token], [token + 20]]))
            text = [[*text[0], token], [*text[1], token + 20]]
            for line, found in zip(text, scores, strict=True):
                assert torch.allclose(engine.logits(line)[-1], found, atol=1e-4), number
