"""Blocks run one by one give what the whole model gives, and show what its linears read."""

import pytest
import torch

from conftest import ARCHITECTURES
from poise.checkpoints import open_checkpoint
from poise.core.registry import get
from poise.pipeline.blocks import Blocks

WINDOWS = [list(range(3, 27)), list(range(100, 124)), list(range(50, 74))]


def linears_by_block(checkpoint):
    found = {}
    for linear in checkpoint.linears():
        if linear.block is not None:
            found.setdefault(linear.block, []).append(linear)
    return found


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_block_by_block_equals_the_whole_model(model_factory, name):
    checkpoint = open_checkpoint(model_factory(name))
    blocks = Blocks(checkpoint)
    hidden = list(blocks.begin(WINDOWS, 2))
    assert [len(part) for part in hidden] == [2, 1]
    for index in range(len(blocks)):
        blocks.open(index)
        with torch.no_grad():
            hidden = [blocks.run(part) for part in hidden]
    blocks.close()
    assert all(value.is_meta for value in blocks.layers.parameters())
    final = torch.cat([blocks.finish(part) for part in hidden])
    with get("engine", "torch")(dtype="float32") as engine:
        engine.load(checkpoint)
        head = engine.model.get_output_embeddings()
        for window, state in zip(WINDOWS, final, strict=True):
            expected = engine.model(input_ids=torch.tensor([window]), output_hidden_states=True)
            assert torch.allclose(head(state), expected.logits[0], atol=2e-5)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_shows_what_every_linear_reads(model_factory, name):
    """Watching changes nothing; every group is shown, alone as together with the others."""
    checkpoint = open_checkpoint(model_factory(name))
    blocks = Blocks(checkpoint)
    (hidden,) = blocks.begin(WINDOWS, 8)
    linears = linears_by_block(checkpoint)[0]
    blocks.open(0)
    groups = blocks.groups(linears)
    assert {group for together in groups for group in together} == {linear.input_group for linear in linears}
    seen = {}
    flat = [group for together in groups for group in together]
    whole = blocks.watch(hidden, flat, lambda group, x, _: seen.setdefault(group, []).append(x), whole=True)
    assert torch.equal(whole, blocks.run(hidden))
    counted = 0
    for linear in linears:
        x = torch.cat(seen.get(linear.input_group, [torch.zeros(0, linear.columns)]))
        assert x.shape[1] == linear.columns
        counted += len(x) > 0
    assert counted > len(linears) / 2
    for together in groups:
        alone = {}

        def keep(group, x, _, alone=alone):
            alone.setdefault(group, []).append(x)

        blocks.watch(hidden, together, keep, whole=False)
        for group in together:
            if group in seen:
                assert torch.equal(torch.cat(alone[group]), torch.cat(seen[group]))


def test_writers_are_those_that_add_to_the_stream_as_they_are(model_factory):
    """Not where a norm stands between, and not where experts write too."""
    found = {}
    for name in ARCHITECTURES:
        checkpoint = open_checkpoint(model_factory(name))
        blocks = Blocks(checkpoint)
        (hidden,) = blocks.begin(WINDOWS, 8)
        linears = linears_by_block(checkpoint)[0]
        blocks.open(0)
        writers = [linear.input_group for linear in linears if linear.role in ("attention.o", "ffn.down")]
        found[name] = blocks.writers(hidden, linears)
        assert found[name] in ((), tuple(writers)), name
        kept = [linear for linear in linears if linear.role != "attention.o"]
        assert blocks.writers(hidden, kept) == ()  # the sum lacks a part
    assert {name for name in found if not found[name]} == {"gemma3_text", "mixtral", "qwen3_moe"}


def test_shows_the_stream_where_a_writer_adds_to_it(model_factory):
    checkpoint = open_checkpoint(model_factory("llama"))
    blocks = Blocks(checkpoint)
    (hidden,) = blocks.begin(WINDOWS, 8)
    linears = linears_by_block(checkpoint)[0]
    blocks.open(0)
    writers = blocks.writers(hidden, linears)
    assert [path.rpartition(".")[2] for path in writers] == ["o_proj", "down_proj"]
    seen, normed = {}, []
    handle = blocks.layers[0].post_attention_layernorm.register_forward_pre_hook(
        lambda _, args: normed.append(args[0].flatten(0, 1))
    )
    groups = [group for together in blocks.groups(linears) for group in together]
    blocks.watch(
        hidden, groups, lambda group, _, stream: seen.update({group: stream}), whole=True, writers=writers
    )
    handle.remove()
    assert torch.equal(seen[writers[0]], hidden.flatten(0, 1))
    assert torch.allclose(seen[writers[1]], normed[0], atol=1e-6)
    assert all(seen[group] is None for group in groups if group not in writers)


def test_putting_zeros_changes_the_output(model_factory):
    for name in ("llama", "gpt2", "mixtral"):
        checkpoint = open_checkpoint(model_factory(name))
        blocks = Blocks(checkpoint)
        (hidden,) = blocks.begin(WINDOWS, 8)
        blocks.open(0)
        before = blocks.run(hidden)
        for linear in linears_by_block(checkpoint)[0]:
            if linear.role.endswith(("down", ".o")) or "down" in linear.role:
                blocks.put(linear, torch.zeros(linear.rows, linear.columns))
        after = blocks.run(hidden)
        assert not torch.allclose(before, after)
        if name == "llama":  # nothing but the residual stream is left
            assert torch.allclose(after, hidden)
