"""A block that waits where matrices are solved gives what running it anew for each of them gives."""

import json
import threading

import pytest
import torch

import poise
from conftest import ARCHITECTURES
from poise.checkpoints import open_checkpoint
from poise.core.plan import Plan
from poise.pipeline import passes as routes
from poise.pipeline.blocks import Blocks
from poise.pipeline.passes import Repeated, Waiting, can_wait, held, room
from poise.pipeline.spool import Spool
from poise.planning.presets import preset_recipe

WINDOWS = [list(range(3, 27)), list(range(100, 124)), list(range(50, 74))]


def opened(folder, tmp_path):
    """The first block of a model: what it is, what enters it, its linears and their input groups, and who writes."""
    checkpoint = open_checkpoint(folder)
    blocks, hidden = Blocks(checkpoint), Spool(tmp_path / "hidden")
    for batch in blocks.begin(WINDOWS, 2):
        hidden.append(batch)
    blocks.open(0)
    linears = [linear for linear in checkpoint.linears() if linear.block == 0]
    return blocks, hidden, linears, blocks.groups(linears), blocks.writers(hidden[0][:1], linears)


def changed_on_the_way(passes, blocks, linears, groups):
    """Every matrix is halved when its inputs were read; those of the second group are not asked for."""
    seen = []
    for number, together in enumerate(groups):

        def see(group, x, state):
            seen.append((group, x.clone(), None if state is None else state.clone()))

        passes.read(together, None if number == 1 else see)
        for linear in linears:
            if linear.input_group in together:
                blocks.put(linear, blocks.checkpoint.read_matrix(linear) / 2)
    passes.leave()
    return seen


def waiting_threads():
    return [thread for thread in threading.enumerate() if thread.name == "block"]


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_runs_that_wait_go_on_with_what_was_put_meanwhile(model_factory, tmp_path, name):
    found = []
    for kind in (Waiting, Repeated):
        blocks, hidden, linears, groups, writers = opened(model_factory(name), tmp_path / kind.__name__)
        names = [group for together in groups for group in together]
        if not all(blocks.dense(group) for group in names):
            pytest.skip("experts are read in one go")
        order = (groups, writers, tmp_path / "last") if kind is Repeated else (names, writers)
        passes = kind(blocks, hidden, *order)
        found.append((changed_on_the_way(passes, blocks, linears, groups), list(hidden)))
        passes.close()
        assert not waiting_threads()
        assert not any(module._forward_pre_hooks for module in blocks.layers[0].modules())
    (ours, left), (theirs, expected) = found
    assert [group for group, _, _ in ours] == [group for group, _, _ in theirs]
    assert len({group for group, _, _ in ours}) > 1
    for (_, x, state), (_, y, other) in zip(ours, theirs, strict=True):
        assert torch.allclose(x, y, rtol=1e-4, atol=1e-5)
        assert (state is None) == (other is None)
        assert state is None or torch.allclose(state, other, rtol=1e-4, atol=1e-5)
    for x, y in zip(left, expected, strict=True):
        assert torch.allclose(x, y, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_runs_wait_where_there_is_room_and_no_router_chooses_tokens(model_factory, tmp_path, name):
    blocks, _, linears, groups, _ = opened(model_factory(name), tmp_path)
    dense = all(blocks.dense(group) for together in groups for group in together)
    assert can_wait(linears, 100, held(linears, 100)) == dense
    assert not can_wait(linears, 100, held(linears, 100) - 1)


def test_runs_of_a_plan_may_hold_what_its_training_takes(llama, monkeypatch):
    checkpoint = open_checkpoint(llama)
    parameters = sum(info.numel for info in checkpoint.tensors().values())

    def of(tune):
        return room(checkpoint, Plan(recipe="", exporter="compressed-tensors", rows=(), tune=tune))

    assert of(None) == of("distill(code_rate=0.004)") == routes.HELD  # a small model takes less than that
    monkeypatch.setattr(routes, "HELD", parameters)
    assert of(None) == parameters < of("distill") < of("distill(code_rate=0.004)")


def test_what_waits_ends_when_it_is_closed(llama, tmp_path):
    blocks, hidden, _, groups, writers = opened(llama, tmp_path)
    passes = Waiting(blocks, hidden, [group for together in groups for group in together], writers)
    passes.read(groups[0], lambda *_: None)
    assert len(waiting_threads()) == len(hidden)
    passes.close()
    assert not waiting_threads()
    assert not any(module._forward_pre_hooks for module in blocks.layers[0].modules())


def test_what_is_interrupted_on_its_way_ends_when_it_is_closed(llama, tmp_path):
    blocks, hidden, _, groups, writers = opened(llama, tmp_path)
    passes = Waiting(blocks, hidden, [group for together in groups for group in together], writers)

    class Interrupted:
        def acquire(self):
            raise KeyboardInterrupt

        def release(self):
            pass

    passes._runs[0]._arrived = Interrupted()
    with pytest.raises(KeyboardInterrupt):
        passes.read(groups[0], lambda *_: None)
    passes.close()
    assert not waiting_threads()


def test_what_is_not_reached_any_more_is_not_shown(llama, tmp_path):
    blocks, hidden, _, groups, writers = opened(llama, tmp_path)
    passes, expected = Waiting(blocks, hidden, groups[0] + groups[-1], writers), [*map(blocks.run, hidden)]
    seen = []
    for together in (groups[-1], groups[0], groups[0]):
        passes.read(together, lambda group, *_: seen.append(group))
    passes.leave()
    passes.close()
    assert seen == groups[-1] * len(hidden)
    assert all(torch.equal(x, y) for x, y in zip(hidden, expected, strict=True))


def test_what_fails_in_a_block_is_raised_where_it_is_asked_for(llama, tmp_path):
    blocks, hidden, _, groups, writers = opened(llama, tmp_path)
    passes = Waiting(blocks, hidden, [group for together in groups for group in together], writers)
    passes.read(groups[0], lambda *_: None)
    blocks.layers[0].mlp.forward = lambda x: x.no_such_thing
    passes.read(groups[1], lambda *_: None)
    with pytest.raises(AttributeError, match="no_such_thing"):
        passes.read(groups[2], lambda *_: None)
    passes.close()
    assert not waiting_threads()


@pytest.mark.parametrize("name", ["llama", "qwen3"])
def test_blocks_wait_where_there_is_room_and_run_anew_where_not(model_factory, tmp_path, monkeypatch, name):
    """Matrices lose the same either way, but for codes that the order of sums may flip."""
    losses, kinds = [], []
    for kind in (Waiting, Repeated):

        def noting(*args, kind=kind):
            kinds.append(kind)
            return kind(*args)

        monkeypatch.setattr(routes, kind.__name__, noting)
    for most in (routes.HELD, 0):
        monkeypatch.setattr(routes, "HELD", most)
        out = tmp_path / str(most)
        poise.quantize(
            model_factory(name), preset_recipe("balanced", 4, 32, quick=False), out, to="compressed-tensors"
        )
        record = json.loads(out.with_name(f"{out.name}.run.json").read_text())
        losses.append({item["name"]: item["output_error"] for item in record["matrices"]})
    assert kinds == [Waiting, Waiting, Repeated, Repeated]
    assert losses[0] == pytest.approx(losses[1], rel=0.02)
