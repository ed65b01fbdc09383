"""Selection: planted clusters are covered, the domain is found, doubles go, and order does not matter."""

import pytest
import torch

from poise.calibration.selection import coverage, doubles, points, random_coverage, select
from poise.core.errors import UsageError


def planted(sizes=(400, 30, 10, 5, 3, 2), hidden=24, seed=0):
    """Clusters of very different sizes; returns states and the cluster of each."""
    dice = torch.Generator().manual_seed(seed)
    centres = torch.linalg.qr(torch.randn(hidden, hidden, generator=dice)).Q[: len(sizes)] * 10
    owner = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))
    order = torch.randperm(len(owner), generator=dice)
    states = centres[owner] + 0.3 * torch.randn(len(owner), hidden, generator=dice)
    return states[order], owner[order]


@pytest.mark.parametrize("method", ["coverage", "cluster"])
def test_planted_clusters_are_covered_where_chance_misses_some(method):
    states, owner = planted()
    hit = {int(owner[choice.index]) for choice in select(states, 12, method=method)}
    assert len(hit) >= (6 if method == "coverage" else 5)  # clusters begin with chance
    missed = [
        len({int(owner[choice.index]) for choice in select(states, 12, method="random", seed=seed)}) < 6
        for seed in range(20)
    ]
    assert sum(missed) > 15


def test_coverage_is_better_than_by_chance():
    states, _ = planted()
    chosen = coverage(states, [choice.index for choice in select(states, 12)])
    by_chance = random_coverage(states, 12)
    assert chosen.largest < 0.3 * by_chance.largest
    assert chosen.p95 <= by_chance.p95
    everything = coverage(states, list(range(len(states))))
    assert everything.largest == pytest.approx(0, abs=1e-6)


def test_the_domain_decides_what_competes():
    states, owner = planted()
    domain = states[owner == 3][:2] + 0.1
    chosen = select(states, 2, domain=domain)
    assert {int(owner[choice.index]) for choice in chosen} == {3}
    assert all(choice.reason.startswith("near to the domain") for choice in chosen)


def test_the_order_of_candidates_changes_nothing():
    states, _ = planted()
    order = torch.randperm(len(states), generator=torch.Generator().manual_seed(5))
    first = {choice.index for choice in select(states, 10)}
    second = {int(order[choice.index]) for choice in select(states[order], 10)}
    assert first == second


def test_nothing_is_chosen_twice_and_all_is_enough():
    states, _ = planted((5, 4))
    for method in ("coverage", "cluster", "random"):
        chosen = [choice.index for choice in select(states, 50, method=method)]
        assert sorted(chosen) == list(range(9))
    same = torch.ones(6, 4)
    assert len({choice.index for choice in select(same, 4, method="cluster")}) == 4


def test_points_are_centred_and_of_unit_size():
    states, _ = planted()
    assert torch.allclose(points(states).mean(0), torch.zeros(24, dtype=torch.float64), atol=1e-9)
    assert float(points(states).square().sum(1).mean()) == pytest.approx(1)
    assert torch.allclose(points(states), points(states * 7 + 3), atol=1e-5)


def test_doubles_are_found_and_the_first_is_kept():
    words = [f"w{number}" for number in range(60)]
    text = " ".join(words)
    near = " ".join([*words[:50], "other", *words[51:]])
    far = " ".join(f"v{number}" for number in range(60))
    assert doubles([text, far, near, text.upper(), "short", "Short "]) == {2: 0, 3: 0, 5: 4}


def test_nonsense_is_refused():
    with pytest.raises(UsageError, match="coverage, cluster, random"):
        select(torch.ones(3, 2), 1, method="best")
    with pytest.raises(UsageError, match="at least one"):
        select(torch.ones(3, 2), 0)
