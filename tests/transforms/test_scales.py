"""Scales of channels: the function stays, what they are for gets better, and planted outliers are found."""

import pytest
import torch
from test_function import assert_same, logits, rewritten

from poise.checkpoints import open_checkpoint
from poise.checkpoints.topology import find_topology
from poise.core.errors import UsageError
from poise.core.registry import build
from poise.core.stats import Stats
from poise.core.topology import Norm, Pair, Topology
from poise.core.transform import Material
from poise.transforms.equalize import pivots

NAMES = ["llama", "qwen2", "qwen3", "gemma3_text", "phi3", "mixtral"]


def stats_of(x):
    hessian = x.T @ x / len(x)
    return Stats(
        second_moment=hessian.diagonal().clone(),
        hessian=hessian,
        mean=x.mean(0),
        largest=x.abs().amax(0),
        n_tokens=len(x),
        data_hash="",
    )


def made_up_stats(checkpoint):
    """Inputs in which some channels are large; matrices of one group read the same."""
    found, dice = {}, torch.Generator().manual_seed(3)
    groups = {}
    for linear in checkpoint.linears():
        if linear.input_group not in groups:
            scale = torch.exp(1.5 * torch.randn(linear.columns, generator=dice))
            groups[linear.input_group] = stats_of(torch.randn(256, linear.columns, generator=dice) * scale)
        found[linear.name] = groups[linear.input_group]
    return found


@pytest.mark.parametrize(
    "spec",
    [
        "awq",
        "awq(grid=3, pairs=False)",
        "smoothquant",
        "smoothquant(strength=0.8)",
        "equalize",
        "equalize(strength=1)",
    ],
)
@pytest.mark.parametrize("name", NAMES)
def test_the_function_stays(model_factory, name, spec):
    checkpoint = open_checkpoint(model_factory(name))
    after = rewritten(checkpoint, spec, stats=made_up_stats(checkpoint))
    changed = [norm.weight for norm in find_topology(checkpoint).norms if norm.block is not None]
    assert any(not torch.equal(after.read(n).float(), checkpoint.read(n).float()) for n in changed)
    assert_same(logits(checkpoint), logits(after))


def one_layer(x, weight, spec, **fields):
    """What a transform does to a norm of ones with one reader."""
    columns = weight.shape[1]
    norm = Norm(
        weight="norm", bias=None, unit=1.0, centered=False, residual=True, readers=("w",), only=True, block=0
    )
    topology = Topology(
        norms=(norm,), pairs=(), embedding="e", head=None, writers=(), biases=(), width=columns, bias_of={}, mixed=None
    )  # fmt: skip
    values = {"w": weight, "norm": torch.ones(columns)}
    material = Material(
        topology=topology,
        read=values.__getitem__,
        formats={"w": build("format", "int(bits=3, group=32, symmetric=False)").resolve("float16")},
        stats={"w": stats_of(x)},
    )
    for rewrite in build("transform", spec).rewrites(material):
        value = values[rewrite.name]
        values[rewrite.name] = rewrite.apply(value.reshape(len(value), -1).double()).view(value.shape).float()
    return values


def test_awq_lowers_the_error_of_planted_outlier_channels():
    dice = torch.Generator().manual_seed(0)
    x, weight = torch.randn(512, 64, generator=dice), torch.randn(32, 64, generator=dice)
    x[:, 5] *= 30
    x[:, 40] *= 20
    values = one_layer(x, weight, "awq")
    format = build("format", "int(bits=3, group=32, symmetric=False)").resolve("float16")
    norm = values["norm"]
    assert torch.allclose(values["w"] * norm, weight, rtol=1e-5)
    assert norm[5] < 0.7 * norm.median()
    wanted = x @ weight.T
    errors = [
        float((given @ build("solver", "rtn").solve(w, format).decode().T - wanted).square().sum())
        for given, w in ((x, weight), (x * norm, values["w"]))
    ]
    assert errors[1] < 0.5 * errors[0]


def test_awq_leaves_alone_what_scales_cannot_better():
    dice = torch.Generator().manual_seed(0)
    x = torch.randn(4096, 64, generator=dice)
    weight = torch.randint(-3, 4, (32, 64), generator=dice).float()
    weight[:, ::32], weight[:, 1::32] = -3, 4  # these are the levels of a 3-bit grid: nothing is lost
    assert torch.equal(one_layer(x, weight, "awq")["w"], weight)


def test_smoothquant_is_its_formula_and_levels_activations():
    dice = torch.Generator().manual_seed(1)
    x, weight = torch.randn(512, 64, generator=dice), torch.randn(32, 64, generator=dice)
    x[:, 9] *= 50
    values = one_layer(x, weight, "smoothquant")
    factor = 1 / values["norm"].double()
    expected = x.abs().amax(0).double().sqrt() / weight.abs().amax(0).double().sqrt()
    ratio = factor / expected
    assert torch.allclose(ratio, ratio[0].expand(64), rtol=1e-5)
    spread = [(v.abs().amax(0).amax() / v.abs().amax(0).median()) for v in (x, x * values["norm"])]
    assert spread[1] < spread[0] / 4


def test_equalize_is_its_formula_where_inputs_do_not_correlate():
    """Then R_jj^2 is the damped second moment itself, whatever the order of columns."""
    dice = torch.Generator().manual_seed(2)
    x = torch.linalg.qr(torch.randn(256, 64, generator=dice))[0] * torch.logspace(0, 1, 64) * 16
    weight = torch.randn(32, 64, generator=dice) * torch.logspace(1, 0, 64).flip(0)
    moment = x.square().mean(0).double()
    cost = (moment + 0.1 * moment.mean()).sqrt()
    for strength in (0.5, 1.0):
        factor = 1 / one_layer(x, weight, f"equalize(strength={strength}, damp=0.1)")["norm"].double()
        expected = (cost / weight.double().square().sum(0).sqrt()) ** (strength / 2)
        ratio = factor / expected
        assert torch.allclose(ratio, ratio[0].expand(64), rtol=1e-4)


def test_equalize_makes_least_what_it_is_derived_from():
    """The product of what errors cost and of what groups hold, among 200 scales around its own."""
    dice = torch.Generator().manual_seed(4)
    x = torch.randn(512, 64, generator=dice) @ torch.randn(64, 64, generator=dice)
    weight = torch.randn(32, 64, generator=dice) * torch.exp(torch.randn(64, generator=dice))
    values = one_layer(x, weight, "equalize(strength=1, damp=0.1)")
    cost = pivots(x.T @ x / 512, 0.1).square()

    def product(scale):
        return float((cost / scale.square()).sum() * (weight.double() * scale).square().sum())

    best = product(1 / values["norm"].double())
    assert best < 0.9 * product(torch.ones(64, dtype=torch.float64))
    for _ in range(200):
        nearby = torch.exp(0.1 * torch.randn(64, generator=dice, dtype=torch.float64))
        assert best < product(nearby / values["norm"].double())


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_equalize_lowers_what_error_feedback_leaves(bits):
    dice = torch.Generator().manual_seed(5)
    x = torch.randn(2048, 64, generator=dice) * torch.exp(torch.randn(64, generator=dice))
    weight = torch.randn(256, 64, generator=dice) * torch.exp(0.5 * torch.randn(64, generator=dice))
    values = one_layer(x, weight, "equalize")
    format = build("format", f"int(bits={bits}, group=32, symmetric=False)").resolve("float16")
    errors = []
    for given, w in ((x, weight), (x * values["norm"], values["w"])):
        got = build("solver", "gptq(damp=0.01)").solve(w, format, stats_of(given)).decode()
        errors.append(float((given @ got.T - x @ weight.T).square().sum()))
    assert errors[1] < 0.85 * errors[0]


def test_equalize_leaves_a_matrix_of_zeros_alone():
    assert torch.equal(
        one_layer(torch.randn(64, 64), torch.zeros(32, 64), "equalize")["norm"], torch.ones(64)
    )


def test_heads_of_values_that_are_read_twice_share_a_scale():
    from poise.transforms._scales import read_by, written_by

    pair = Pair(writer="v", reader="o", bias=None, head=2, repeats=3, block=0)
    assert read_by(pair, torch.tensor([1.0, 2, 3, 4])).tolist() == [1, 2] * 3 + [3, 4] * 3
    assert written_by(pair, torch.arange(12.0)).tolist() == [2, 3, 8, 9]


@pytest.mark.parametrize("spec", ["awq(grid=0)", "smoothquant(strength=1.5)", "equalize(strength=2)", "equalize(damp=0)", "rotate(kind='wild')", "rotate(stream=False, values=False)", "learned-rotation(steps=0)"])  # fmt: skip
def test_settings_that_make_no_sense_are_refused(spec):
    with pytest.raises(UsageError):
        build("transform", spec)
