"""A learned rotation: orthogonal, the function stays, and rounding errors fall."""

import torch
from test_function import assert_same, logits, rewritten

from poise.checkpoints import open_checkpoint
from poise.checkpoints.topology import find_topology
from poise.core.registry import build
from poise.core.transform import Material
from poise.transforms.learned_rotation import _turned


def rounding_error(checkpoint, names):
    solver = build("solver", "rtn")
    format = build("format", "int(bits=3, group=16)").resolve("float16")
    matrices = {linear.name: linear for linear in checkpoint.linears()}
    found = 0.0
    for name in names:
        weight = checkpoint.read_matrix(matrices[name]).float()
        found += float(
            (weight - solver.solve(weight, format).decode()).square().sum() / weight.square().sum()
        )
    return found


def test_the_function_stays_and_errors_fall_below_those_of_the_start(model_factory):
    checkpoint = open_checkpoint(model_factory("llama"))
    start = rewritten(checkpoint, "rotate(values=False)")
    after = rewritten(checkpoint, "learned-rotation(steps=150)")
    assert_same(logits(checkpoint), logits(after))
    topology = find_topology(checkpoint)
    names = [*topology.writers, *(name for norm in topology.norms for name in norm.readers)]
    assert rounding_error(after, names) < 0.97 * rounding_error(start, names)


def test_equal_seeds_learn_equal_rotations(model_factory):
    checkpoint = open_checkpoint(model_factory("llama"))
    one, same, other = (
        rewritten(checkpoint, f"learned-rotation(steps=3, seed={seed})").fingerprint() for seed in (0, 0, 1)
    )
    assert one == same != other


def test_a_step_stays_on_the_manifold_and_goes_downhill():
    dice = torch.Generator().manual_seed(0)
    target = torch.linalg.qr(torch.randn(12, 12, generator=dice))[0]
    matrix, losses = torch.linalg.qr(torch.randn(12, 12, generator=dice))[0], []
    target = target * torch.linalg.det(target @ matrix.T).sign()  # of the same component
    for step in range(400):
        losses.append(float((matrix - target).square().sum()))
        matrix = _turned(matrix, matrix - target, 0.1 * (1 - step / 400))
        assert torch.allclose(matrix @ matrix.T, torch.eye(12), atol=1e-4)
    assert losses[-1] < 0.05 * losses[0]


def test_nothing_planned_means_the_start(model_factory):
    checkpoint = open_checkpoint(model_factory("llama"))
    material = Material(topology=find_topology(checkpoint), read=checkpoint.read, formats={}, stats={})
    learned = build("transform", "learned-rotation").learn(material)
    assert torch.allclose(learned @ learned.T, torch.eye(64, dtype=torch.float64), atol=1e-12)
