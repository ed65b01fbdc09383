"""Weights of tokens: squared gradients of the loss, and Hessians in which they count."""

import dataclasses

import pytest
import torch
from test_stream import outcomes, stats_seen  # noqa: F401  # a fixture

import poise
from poise.checkpoints import open_checkpoint
from poise.core.registry import get
from poise.pipeline.gradients import squared_gradients
from poise.planning.presets import preset_recipe

PATH = "model.layers.1.mlp.down_proj"


def windows(count=6, length=32):
    dice = torch.Generator().manual_seed(4)
    return torch.randint(3, 320, (count, length), generator=dice).tolist()


def test_they_are_the_fisher_information_of_the_outputs(model_factory):
    """For outputs of the last block the expectation over drawn labels is known: of the variance of the scores' gradient.

    With g = J^T (p - onehot), E g g^T = J^T (diag p - p p^T) J, J the Jacobian of the scores by the output.
    """
    checkpoint = open_checkpoint(model_factory("llama"))
    text = windows()
    found = squared_gradients(checkpoint, text, {PATH: 1}, lambda *_: None)[PATH].squeeze(1)
    with get("engine", "torch")(dtype="float32") as engine:
        engine.load(checkpoint)
        model, kept = engine.model, []
        model.get_submodule(PATH).register_forward_hook(lambda _, __, out: kept.append(out))
        expected = []
        for window in text:
            kept.clear()
            scores = model(input_ids=torch.tensor([window]), use_cache=False).logits[0]
            share = scores.detach().softmax(-1)
            dice = torch.Generator().manual_seed(0)
            total = torch.zeros(len(window))
            for label in torch.multinomial(share, 40, replacement=True, generator=dice).T:
                loss = torch.nn.functional.cross_entropy(scores, label, reduction="sum")
                (gradient,) = torch.autograd.grad(loss, kept[0], retain_graph=True)
                total += gradient[0].square().mean(-1) / 40
            expected.append(total)
    expected = torch.cat(expected)
    expected /= expected.mean()
    assert found.mean() == pytest.approx(1.0, abs=1e-4)
    assert torch.corrcoef(torch.stack((found, expected)))[0, 1] > 0.3  # one draw a token is noisy
    assert found.shape == (6 * 32,)


def test_runs_split_the_outputs(model_factory):
    checkpoint = open_checkpoint(model_factory("llama"))
    text = windows()
    whole = squared_gradients(checkpoint, text, {PATH: 1}, lambda *_: None)[PATH]
    parts = squared_gradients(checkpoint, text, {PATH: 4}, lambda *_: None)[PATH]
    assert parts.shape == (192, 4)
    assert torch.allclose(parts.mean(0), torch.ones(4), atol=1e-4)
    assert torch.corrcoef(torch.stack((parts.mean(1), whole.squeeze(1))))[0, 1] > 0.9


def test_the_batch_changes_nothing_but_the_draw(model_factory, monkeypatch):
    checkpoint = open_checkpoint(model_factory("llama"))
    first = squared_gradients(checkpoint, windows(), {PATH: 1}, lambda *_: None)
    again = squared_gradients(checkpoint, windows(), {PATH: 1}, lambda *_: None)
    assert torch.equal(first[PATH], again[PATH])


def test_guided_hessians_weigh_tokens(model_factory, tmp_path, stats_seen):  # noqa: F811
    recipe = preset_recipe("balanced", 3, 32, quick=False)
    rules = tuple(
        dataclasses.replace(rule, solver="guided(runs=2) -> refine") if rule.options else rule
        for rule in recipe.rules
    )
    recipe = dataclasses.replace(recipe, rules=rules, tokens=1024)
    poise.quantize(model_factory("llama"), recipe, tmp_path / "out", to="compressed-tensors")
    assert len(stats_seen) == 14
    for stats in stats_seen.values():
        n = len(stats.second_moment)
        assert stats.hessian.shape == stats.cross.shape == (2, n, n)
        assert not torch.allclose(stats.hessian[0], stats.hessian[1])
        assert torch.allclose(stats.hessian, stats.hessian.mT, rtol=1e-3, atol=1e-5)
        assert float(torch.linalg.eigvalsh(stats.hessian[0].double()).min()) > -1e-4
    for item in outcomes(tmp_path / "out").values():
        assert item["output_error"] < item["nearest"]


def test_experts_have_no_gradients_and_are_solved_all_the_same(model_factory, tmp_path):
    recipe = preset_recipe("balanced", 4, 32, quick=False)
    rules = tuple(
        dataclasses.replace(rule, solver="guided") if rule.options else rule for rule in recipe.rules
    )
    recipe = dataclasses.replace(recipe, rules=rules, tokens=512)
    poise.quantize(model_factory("mixtral"), recipe, tmp_path / "out", to="gguf")
    assert len(outcomes(tmp_path / "out")) > 14
