"""How much tokens are attended to: as transformers computes it, and in the statistics of values."""

import dataclasses

import pytest
import torch
from test_stream import stats_seen  # noqa: F401  # a fixture
from torch.nn.functional import scaled_dot_product_attention

import poise
from poise.calibration.text import load_text
from poise.checkpoints import open_checkpoint
from poise.core.registry import get
from poise.pipeline import attention, stream
from poise.pipeline.blocks import Blocks
from poise.planning.presets import preset_recipe

WINDOWS = [list(range(3, 27)), list(range(100, 124)), list(range(50, 74))]


@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma3_text", "phi3", "mixtral"])
def test_it_is_the_attention_of_the_whole_model(model_factory, name):
    """In every block, sliding windows among them, with heads of values that several queries share."""
    checkpoint = open_checkpoint(model_factory(name))
    blocks = Blocks(checkpoint)
    (hidden,) = blocks.begin(WINDOWS, 3)
    with get("engine", "torch")(dtype="float32") as engine:
        engine.load(checkpoint)
        engine.model.set_attn_implementation("eager")
        with torch.no_grad():
            told = engine.model(input_ids=torch.tensor(WINDOWS), output_attentions=True).attentions
    for index, wanted in enumerate(told):
        blocks.open(index)
        found = attention.attended(blocks, hidden)
        assert found.mean() == pytest.approx(1, abs=1e-4)
        assert torch.allclose(found, wanted.mean(1).sum(1).flatten(), atol=1e-4)
        hidden = blocks.run(hidden)


@pytest.mark.parametrize("mask", ["causal", "boolean", "added", "none"])
def test_masks_and_scales_are_those_of_the_attention(mask):
    """Values that are one at a single place tell what that place gets."""
    dice = torch.Generator().manual_seed(0)
    query, key = torch.randn(2, 4, 6, 8, generator=dice), torch.randn(2, 2, 6, 8, generator=dice)
    seen = torch.rand(2, 1, 6, 6, generator=dice) < 0.7
    seen |= torch.eye(6, dtype=torch.bool)
    kind = {
        "causal": {"is_causal": True},
        "boolean": {"attn_mask": seen},
        "added": {"attn_mask": torch.randn(2, 4, 6, 6, generator=dice)},
        "none": {},
    }[mask]
    values = torch.eye(6).expand(2, 2, 6, 6)
    shares = scaled_dot_product_attention(query, key, values, scale=0.3, enable_gqa=True, **kind)
    found = attention.received(query, key, values, scale=0.3, enable_gqa=True, **kind)
    assert torch.allclose(found, shares.sum(2).mean(1), atol=1e-6)


def test_a_block_that_attends_to_nothing_has_no_weights(model_factory, monkeypatch):
    blocks = Blocks(open_checkpoint(model_factory("llama")))
    (hidden,) = blocks.begin(WINDOWS, 3)
    blocks.open(0)
    monkeypatch.setattr(
        blocks.layers[0].self_attn, "forward", lambda hidden_states, **_: (hidden_states, None)
    )
    assert attention.attended(blocks, hidden) is None


@pytest.mark.parametrize("solver", ["gptq", "gptaq -> refine"])
def test_values_count_tokens_by_it_and_nothing_else_does(
    model_factory,
    tmp_path,
    stats_seen,  # noqa: F811
    monkeypatch,
    solver,
):
    monkeypatch.setattr(stream, "ROUNDED", False)
    llama, text = model_factory("llama"), load_text(None, "calibration")
    file = tmp_path / "text.txt"
    file.write_text(text.content, encoding="utf-8")
    wish = preset_recipe("balanced", 3, 32, quick=False)
    rules = tuple(dataclasses.replace(rule, solver=solver) if rule.options else rule for rule in wish.rules)
    wish = dataclasses.replace(wish, rules=rules, transforms=(), tokens=1024)
    poise.quantize(llama, wish, tmp_path / "out", to="compressed-tensors", calibration=file)
    checkpoint = open_checkpoint(llama)
    blocks = Blocks(checkpoint)
    length = min(512, checkpoint.context)
    windows = text.windows(checkpoint.tokenizer(), length, 1024 // length)
    (hidden,) = blocks.begin(windows, len(windows))
    blocks.open(0)
    reads = []
    blocks.watch(hidden, ["model.layers.0.self_attn.q_proj"], lambda _, x, __: reads.append(x), whole=False)
    weights = attention.attended(blocks, hidden).unsqueeze(1)
    for letter, counts in (("q", torch.ones_like(weights)), ("k", torch.ones_like(weights)), ("v", weights)):
        expected = reads[0].T @ (reads[0] * counts) / len(counts)
        found = stats_seen[f"model.layers.0.self_attn.{letter}_proj.weight"]
        assert torch.allclose(found.hessian, expected, rtol=1e-3, atol=1e-5 * float(expected.abs().max()))
        assert torch.allclose(found.second_moment, expected.diagonal(), rtol=1e-3)
