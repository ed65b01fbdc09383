"""What every collector promises: order, batches and merging leave no trace; bad input is named."""

import subprocess
import sys

import pytest
import torch

from poise.core.errors import PoiseError, UsageError
from poise.core.registry import get, name_of, names, parse_spec

COLUMNS, ROWS, TOKENS = 6, 5, 5000
SPECS = (
    "second-moment",
    "hessian",
    "cross",
    "absmax",
    "absmax(axis=1)",
    "minmax(axis=1)",
    "percentile",
    "percentile(axis=1, symmetric=False, percentile=99)",
    "mse(bits=4, symmetric=False)",
    "mse(bits=3, axis=1)",
    "entropy(axis=1, bits=4)",
    "fisher(runs=2)",
    "kronecker",
)


def make(spec, name="blocks.3.mlp"):
    kind, options = parse_spec(spec)
    cls = get("collector", kind)
    if "gradient" in cls.reads:
        options["rows"] = ROWS
    return cls(columns=COLUMNS, name=name, **options)


def stream(collector, tokens=TOKENS, seed=0):
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(COLUMNS, COLUMNS, generator=generator)
    x = torch.randn(tokens, COLUMNS, generator=generator) @ mix + 0.3
    return tuple(
        {
            "x": x,
            "original": x + 0.1 * torch.randn(tokens, COLUMNS, generator=generator),
            "gradient": torch.randn(tokens, ROWS, generator=generator) * x[:, :1] * 1e-4,
        }[what]
        for what in collector.reads
    )


def collected(spec, tensors, cuts=()):
    collector = make(spec)
    for parts in zip(*(torch.tensor_split(tensor, list(cuts)) for tensor in tensors), strict=True):
        collector.add(*parts)
    return collector


def close(a, b, exactly=False):
    assert a.keys() == b.keys()
    for key in a:
        if exactly:
            assert torch.equal(a[key], b[key]), key
        else:
            assert torch.allclose(a[key], b[key], rtol=2e-5, atol=2e-5 * float(b[key].abs().max())), key


def test_every_collector_is_here():
    assert {parse_spec(spec)[0] for spec in SPECS} == set(names("collector"))
    assert all(name_of(get("collector", name)) == name for name in names("collector"))


@pytest.mark.parametrize("spec", SPECS)
def test_batches_change_rounding_at_most_and_matrices_not_at_all(spec):
    tensors = stream(make(spec))
    whole = collected(spec, tensors)
    for cuts in ((1, 2, 3, 2047), (2048, 4096), range(100, TOKENS, 100), (0, 4999, 5000)):
        split = collected(spec, tensors, cuts)
        assert split.n_tokens == whole.n_tokens == TOKENS
        close(split.result(), whole.result(), exactly=spec != "second-moment")


@pytest.mark.parametrize("spec", SPECS)
def test_order_changes_rounding_at_most(spec):
    tensors = stream(make(spec))
    order = torch.randperm(TOKENS, generator=torch.Generator().manual_seed(1))
    close(collected(spec, [t[order] for t in tensors]).result(), collected(spec, tensors).result())


@pytest.mark.parametrize("spec", SPECS)
def test_merging_is_reading_both(spec):
    tensors = stream(make(spec))
    whole = collected(spec, tensors).result()
    for cut in (0, 17, 3000):
        first, second = (
            collected(spec, [t[part] for t in tensors]) for part in (slice(cut), slice(cut, None))
        )
        before = second.result()
        first.merge(second)
        assert first.n_tokens == TOKENS
        close(first.result(), whole)
        close(second.result(), before, exactly=True)


@pytest.mark.parametrize("spec", SPECS)
def test_asking_early_and_adding_nothing_changes_nothing(spec):
    tensors = stream(make(spec))
    asked = make(spec)
    asked.add(*(t[:3000] for t in tensors))
    first = asked.result()
    kept = {key: value.clone() for key, value in first.items()}
    asked.add(*(t[:0] for t in tensors))
    asked.add(*(t[3000:] for t in tensors))
    close(asked.result(), collected(spec, tensors).result(), exactly=spec != "second-moment")
    close(first, kept, exactly=True)


@pytest.mark.parametrize("spec", SPECS)
def test_results_are_float32_and_inputs_stay(spec):
    tensors = stream(make(spec), 300)
    before = [t.clone() for t in tensors]
    result = collected(spec, tensors).result()
    assert {value.dtype for value in result.values()} == {torch.float32}
    assert all(map(torch.equal, tensors, before))
    held = make(spec)
    held.add(*tensors)
    for tensor in tensors:
        tensor.zero_()  # a caller may use its memory again
    close(held.result(), result, exactly=True)


@pytest.mark.parametrize("spec", SPECS)
def test_low_precision_inputs_are_summed_in_float32(spec):
    tensors = [t.bfloat16() for t in stream(make(spec))]
    close(
        collected(spec, tensors).result(),
        collected(spec, [t.float() for t in tensors]).result(),
        exactly=True,
    )


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_values_that_are_not_finite_name_layer_and_place(spec, value):
    collector = make(spec)
    tensors = stream(collector, 50)
    collector.add(*tensors)
    tensors[-1][7, 2] = value
    with pytest.raises(
        PoiseError, match=rf"blocks.3.mlp: {collector.reads[-1]} is not finite.*token 57, column 2"
    ):
        collector.add(*tensors)
    assert collector.n_tokens == 50


@pytest.mark.parametrize("spec", SPECS)
def test_shapes_are_checked(spec):
    collector = make(spec)
    tensors = stream(collector, 8)
    with pytest.raises(PoiseError, match="mlp: wants"):
        collector.add(*tensors, tensors[0])
    with pytest.raises(PoiseError, match=r"must be floating \[8, "):
        collector.add(*tensors[:-1], tensors[-1][:, :-1])
    with pytest.raises(PoiseError, match="must be floating"):
        collector.add(*tensors[:-1], tensors[-1].long())
    with pytest.raises(PoiseError, match="must be floating"):
        collector.add(*(t.unsqueeze(0) for t in tensors))


@pytest.mark.parametrize("spec", SPECS)
def test_without_tokens_there_is_no_result(spec):
    with pytest.raises(PoiseError, match="mlp: no token"):
        make(spec).result()


def test_only_equals_are_merged():
    with pytest.raises(PoiseError, match="cannot be merged"):
        make("percentile").merge(make("percentile(percentile=99)"))
    with pytest.raises(PoiseError, match="cannot be merged"):
        make("hessian").merge(make("second-moment"))
    turned = make("kronecker")
    turned.add(*stream(turned))
    turned.turn()
    with pytest.raises(PoiseError, match="another pass"):
        make("kronecker").merge(turned)


@pytest.mark.parametrize("spec", ["hessian", "second-moment"])
def test_sums_beyond_float32_are_no_result(spec):
    with pytest.raises(PoiseError, match="beyond float32"):
        collected(spec, (torch.full((8, COLUMNS), 1e30),)).result()


@pytest.mark.parametrize(
    "spec", ["absmax(axis=2)", "percentile(percentile=0)", "mse(bits=0)", "entropy(bits=9)", "mse(bins=100)"]
)
def test_options_are_checked(spec):
    with pytest.raises(UsageError, match="mlp: "):
        make(spec)


def test_importing_the_contract_is_light():
    code = "import sys, poise.core.registry; print('torch' in sys.modules)"
    assert (
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "False"
    )
