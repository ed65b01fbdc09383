"""Recipes with transforms: artifacts mean the same model, runs resume, and what cannot be done is said beforehand."""

import pytest
import torch
from test_quantize import contents

import poise
from poise.checkpoints import open_checkpoint
from poise.checkpoints.topology import find_topology
from poise.core.errors import UsageError
from poise.core.plan import Option, Plan, Recipe, Rule
from poise.core.registry import get
from poise.core.solver import Solver

WINDOW = list(range(40, 72))


def recipe(*transforms, format="int(bits=8, group=32)", solver="rtn", **fields):
    keep = [Rule(role=role, options=(), optional=True) for role in ("router", "head", "embedding")]
    rule = Rule(options=(Option(format=format), Option(format="q8_0")), solver=solver)
    return Recipe(
        name="r", description="d", rules=(*keep, rule), transforms=transforms, tokens=2048, **fields
    )


def answers(model, engine="torch"):
    with get("engine", engine)() as runner:
        runner.load(open_checkpoint(model))
        return torch.log_softmax(runner.logits(WINDOW), -1)


def divergence(p, q):
    return float((p.exp() * (p - q)).sum(-1).mean())


@pytest.mark.parametrize("exporter", ["compressed-tensors", "gguf"])
@pytest.mark.parametrize(
    ("name", "transforms"),
    [
        ("llama", ["fold", "rotate", "awq"]),
        ("llama-tied", ["untie", "fold", "learned-rotation(steps=5)"]),
        ("qwen2", ["awq", "smoothquant", "rotate", "bias-correction"]),
        ("qwen3_moe", ["smoothquant", "rotate(values=False)"]),
        ("gemma3_text", ["equalize"]),
    ],
)
def test_the_artifact_is_still_the_model(model_factory, tmp_path, name, transforms, exporter):
    folder = model_factory(name)
    plain, turned = (
        poise.quantize(folder, recipe(*specs), tmp_path / str(len(specs)), to=exporter)[0]
        for specs in ((), transforms)
    )
    assert turned.plan.transforms == tuple(transforms)
    assert Plan.from_json(turned.plan.to_json()) == turned.plan
    wanted = answers(folder)
    assert divergence(wanted, answers(turned.model)) < 20 * divergence(wanted, answers(plain.model)) + 1e-4
    before, after = (open_checkpoint(artifact.model) for artifact in (plain, turned))
    changed = [
        linear.name
        for linear in before.linears()
        if linear.block is not None and not torch.equal(before.read_matrix(linear), after.read_matrix(linear))
    ]
    assert len(changed) > 4
    has_text = any(spec.startswith(("awq", "smoothquant", "equalize", "bias")) for spec in transforms)
    assert (turned.manifest.calibration is not None) == has_text


def test_llama_cpp_runs_a_rotated_model(model_factory, tmp_path):
    pytest.importorskip("xllamacpp")
    (artifact,) = poise.quantize(
        model_factory("llama-tied"), recipe("untie", "rotate"), tmp_path / "o", to="gguf"
    )
    wanted = answers(model_factory("llama-tied"))
    assert divergence(wanted, answers(artifact.model, "llamacpp")) < 1e-3


def test_biases_are_corrected_by_what_rounding_did_to_means(model_factory, tmp_path):
    folder = model_factory("qwen2")
    rough = recipe("bias-correction", format="int(bits=2, group=32, symmetric=False)")
    (artifact,) = poise.quantize(folder, rough, tmp_path / "out", to="compressed-tensors", calibration="self")
    before, after = open_checkpoint(folder), open_checkpoint(artifact.model)
    name = "model.layers.0.self_attn.k_proj"
    linear = next(item for item in before.linears() if item.name == f"{name}.weight")
    lost = before.read_matrix(linear).float() - after.read_matrix(linear).float()
    change = after.read(f"{name}.bias").float() - before.read(f"{name}.bias").float()
    # The first block reads the same in both models: the change is what was lost of one mean input.
    found = torch.linalg.lstsq(lost, change.unsqueeze(1)).solution
    assert torch.allclose(lost @ found, change.unsqueeze(1), atol=1e-4)
    assert change.abs().max() > 1e-3
    other = before.read("model.layers.1.self_attn.q_proj.bias").float()
    assert not torch.equal(other, after.read("model.layers.1.self_attn.q_proj.bias").float())


def test_an_interrupted_run_resumes_to_the_same_bytes(model_factory, tmp_path, monkeypatch):
    folder, wish = model_factory("qwen2"), recipe("awq", "rotate", "bias-correction", solver="search")
    poise.quantize(folder, wish, tmp_path / "whole", to="compressed-tensors")
    whole, left = Solver.solve, [3]

    def interrupted(self, *args, **kwargs):
        if not left[0]:
            raise KeyboardInterrupt
        left[0] -= 1
        return whole(self, *args, **kwargs)

    monkeypatch.setattr(Solver, "solve", interrupted)
    with pytest.raises(KeyboardInterrupt):
        poise.quantize(folder, wish, tmp_path / "out", to="compressed-tensors")
    monkeypatch.setattr(Solver, "solve", whole)
    poise.quantize(folder, wish, tmp_path / "out", to="compressed-tensors", resume=True)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


@pytest.mark.parametrize(
    ("name", "transforms", "said"),
    [
        ("llama-tied", ["rotate"], "untie"),
        ("llama", ["fold", "untie"], "before all"),
        ("llama", ["untie"], "already"),
        ("llama", ["bias-correction"], "no matrix of this model has a bias"),
        ("qwen2", ["bias-correction", "fold"], "behind all other"),
        ("gpt2", ["rotate"], "residual stream"),
        ("llama", ["spin"], "no transform named"),
    ],
)
def test_what_cannot_be_done_is_said_before_anything_is_written(
    model_factory, tmp_path, name, transforms, said
):
    for run in (poise.quantize, poise.dry_run):
        with pytest.raises(UsageError, match=said):
            run(model_factory(name), recipe(*transforms), tmp_path / "out", to="compressed-tensors")
    assert list(tmp_path.iterdir()) == []


def test_what_topology_knows_of_biases(model_factory):
    assert len(find_topology(open_checkpoint(model_factory("qwen2"))).bias_of) == 6
    assert len(find_topology(open_checkpoint(model_factory("gpt2"))).bias_of) == 8


@pytest.mark.parametrize(("spec", "most"), [("equalize", 1024), ("awq(grid=2)", 2048)])
def test_transforms_look_at_as_much_text_as_they_want(llama, tmp_path, monkeypatch, spec, most):
    cls = get("transform", spec.partition("(")[0])
    seen, whole = set(), cls.rewrites

    def noting(self, material):
        seen.update(stats.n_tokens for stats in material.stats.values())
        return whole(self, material)

    monkeypatch.setattr(cls, "rewrites", noting)
    monkeypatch.setattr(get("transform", "equalize"), "tokens", 1024)
    poise.quantize(llama, recipe(spec), tmp_path / "o", calibration="self")
    assert seen == {most}
