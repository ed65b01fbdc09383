"""What the benchmark of quality refuses and how it counts; the peers themselves are not run here."""

import importlib.util
import math
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


def load(path: str) -> ModuleType:
    name = "benchmark_" + Path(path).stem
    spec = importlib.util.spec_from_file_location(name, BENCHMARKS / path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


contract = load("peers/contract.py")
judging = load("judging.py")
NAME = "model.layers.0.mlp.up_proj.weight"


@pytest.fixture
def task() -> object:
    return contract.Task(model=Path(), tokens=Path(), out=Path(), bits=2, group=64, recipe="any", seed=0)


def grid(rows: int = 3, columns: int = 128, values: int = 4) -> torch.Tensor:
    """A matrix with ``values`` values in each group, other ones in each."""
    generator = torch.Generator().manual_seed(0)
    codes = torch.arange(rows * columns).reshape(rows, columns // 64, 64) % values
    return (codes * torch.rand(rows, columns // 64, 1, generator=generator)).reshape(rows, columns)


def test_a_group_has_as_many_values_as_codes(task: object) -> None:
    before = torch.randn(3, 128, generator=torch.Generator().manual_seed(1))
    contract.check({NAME: grid()}, {NAME: before}, task)
    assert contract.most_values(grid(), 64) == 4
    assert contract.most_values(grid(), 128) > 4


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda w: w.index_put((torch.tensor(1), torch.tensor(70)), torch.tensor(9.0)), "5 values"),
        (lambda w: w.index_put((torch.tensor(0), torch.tensor(0)), torch.tensor(math.nan)), "not finite"),
        (lambda w: w[:, :64], "was"),
    ],
)
def test_one_wrong_weight_is_refused(task: object, spoil: object, said: str) -> None:
    before = torch.zeros(3, 128)
    with pytest.raises(SystemExit, match=said):
        contract.check({NAME: spoil(grid())}, {NAME: before}, task)  # type: ignore[operator]


def test_weights_as_they_were_are_refused(task: object) -> None:
    with pytest.raises(SystemExit, match="not quantized"):
        contract.check({NAME: grid()}, {NAME: grid()}, task)
    with pytest.raises(SystemExit, match="missing"):
        contract.check({}, {NAME: grid()}, task)


def test_tensors_that_are_no_linears_may_stay(task: object) -> None:
    norm = {"model.norm.weight": torch.randn(5)}
    contract.check(norm, norm, task)
    assert not contract.is_linear("model.embed_tokens.weight")
    assert not contract.is_linear("lm_head.weight")
    assert contract.is_linear(NAME)


def test_bits_by_hand(task: object) -> None:
    assert contract.affine_bits(task) == 2 + 18 / 64
    assert contract.affine_bits(task, zero=16) == 2.5


def test_divergence_by_hand() -> None:
    """Two tokens to choose from; the last position predicts nothing and does not count."""
    wanted = torch.tensor([[0.5, 0.5], [0.9, 0.1], [0.0, 1.0]]).clamp(min=1e-30).log()
    got = torch.tensor([[0.25, 0.75], [0.9, 0.1], [1.0, 0.0]]).clamp(min=1e-30).log()
    lost, original, own, agree = judging.compare(wanted, got, [0, 1, 0])
    assert lost == pytest.approx((0.5 * math.log(2) + 0.5 * math.log(2 / 3)) / 2)
    assert original == pytest.approx(-(math.log(0.5) + math.log(0.9)) / 2)
    assert own == pytest.approx(-(math.log(0.75) + math.log(0.9)) / 2)
    assert agree == 0.5


@pytest.mark.parametrize(("count", "quantile"), [(12, 2.201), (24, 2.069), (101, 1.984)])
def test_interval_is_students(count: int, quantile: float) -> None:
    values = tuple(float(i % 2) for i in range(count))
    spread = torch.tensor(values).std().item() / math.sqrt(count)
    assert judging.half_interval(values) / spread == pytest.approx(quantile, rel=2e-3)
    assert math.isnan(judging.half_interval((1.0,)))


def test_ratio_pairs_windows() -> None:
    """Windows differ tenfold, the models by half everywhere: the ratio has no spread."""
    other = [10.0**i for i in range(-2, 3)]
    assert judging.ratio([0.5 * value for value in other], other) == pytest.approx((0.5, 0.5, 0.5))
    value, low, high = judging.ratio(other[::-1], other)
    assert low < value < high


def test_halves_cut_at_articles() -> None:
    text = "\n = A = \n" + "a" * 50 + "\n = B = \n" + "b" * 90
    first, second = judging.halves(text)
    assert first + second == text
    assert second.startswith("\n = B")
