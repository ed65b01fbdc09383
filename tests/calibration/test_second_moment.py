"""E[x^2] of every layer's inputs, against the diagonal of X^T X."""

import pytest
import torch
from torch import nn

from poise.calibration.second_moment import SecondMoments
from poise.core.errors import PoiseError


class Small(nn.Module):
    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(20, 6)
        self.first = nn.Linear(6, 5)
        self.second = nn.Linear(5, 4, bias=False)
        self.expert = nn.Linear(5, 3)
        self.unused = nn.Linear(4, 4)

    def forward(self, tokens, chosen=0):
        hidden = torch.tanh(self.first(self.table(tokens)))
        self.expert(hidden[..., :chosen, :])
        return self.second(hidden)


MODULES = ("table", "first", "second", "expert", "unused", "not.there")


@pytest.fixture
def model():
    torch.manual_seed(0)
    return Small()


@pytest.fixture
def tokens():
    return torch.randint(20, (12, 8), generator=torch.Generator().manual_seed(1))


def moments(model, batches, **arguments):
    with SecondMoments(model, MODULES) as collector, torch.no_grad():
        for batch in batches:
            model(batch, **arguments)
    return collector.stats("hash")


def test_it_is_the_diagonal_of_the_gram_matrix(model, tokens):
    stats = moments(model, [tokens])
    x = model.table(tokens).detach().reshape(-1, 6).double()
    gram = x.T @ x / len(x)
    assert torch.allclose(stats["first"].second_moment.double(), gram.diagonal(), rtol=1e-6)
    h = torch.tanh(model.first(x.float())).detach().double()
    assert torch.allclose(stats["second"].second_moment.double(), (h.T @ h / len(h)).diagonal(), rtol=1e-6)
    assert stats["second"].n_tokens == 96
    assert stats["second"].data_hash == "hash"
    assert stats["second"].second_moment.dtype == torch.float32


def test_how_the_text_is_split_changes_nothing(model, tokens):
    whole = moments(model, [tokens])
    for batches in (list(tokens), [tokens[:5], tokens[5:]], [tokens.reshape(-1)]):
        split = moments(model, batches)
        assert split.keys() == whole.keys()
        for path, stats in split.items():
            assert stats.n_tokens == whole[path].n_tokens
            assert torch.allclose(stats.second_moment, whole[path].second_moment, rtol=1e-6)


def test_token_numbers_are_no_activations_and_what_read_nothing_has_no_statistics(model, tokens):
    assert moments(model, [tokens]).keys() == {"first", "second"}


def test_an_expert_that_no_token_chose_is_left_out_and_a_later_choice_counts(model, tokens):
    assert "expert" not in moments(model, [tokens, tokens])
    with SecondMoments(model, MODULES) as collector, torch.no_grad():
        model(tokens)
        model(tokens, chosen=2)
    assert collector.stats("hash")["expert"].n_tokens == 24


def test_columns_that_are_always_zero_weigh_nothing(model, tokens):
    with torch.no_grad():
        model.table.weight[:, 2] = 0
    assert moments(model, [tokens])["first"].second_moment[2] == 0


def test_low_precision_inputs_are_summed_in_high_precision():
    layer = nn.Sequential(nn.Linear(3, 1, dtype=torch.bfloat16))
    with SecondMoments(layer, ["0"]) as collector, torch.no_grad():
        for _ in range(50):
            layer(torch.full((100, 3), 0.1, dtype=torch.bfloat16))
    expected = float(torch.tensor(0.1, dtype=torch.bfloat16)) ** 2
    assert collector.stats("")["0"].second_moment.tolist() == pytest.approx([expected] * 3, rel=1e-6)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_activations_that_are_not_finite_name_the_module(model, tokens, value):
    with torch.no_grad():
        model.table.weight[int(tokens[0, 0]), 3] = value
    with pytest.raises(PoiseError, match="first: its inputs are not finite"):
        moments(model, [tokens])


def test_hooks_are_gone_afterwards_also_after_an_error(model, tokens):
    def hooks():
        return sum(len(module._forward_pre_hooks) for module in model.modules())

    with SecondMoments(model, MODULES):
        assert hooks() == 5
    assert hooks() == 0
    with pytest.raises(KeyboardInterrupt), SecondMoments(model, MODULES):
        raise KeyboardInterrupt
    assert hooks() == 0


def test_watching_changes_nothing(model, tokens):
    before = model(tokens)
    with SecondMoments(model, MODULES):
        watched = model(tokens)
    assert torch.equal(before, watched)
