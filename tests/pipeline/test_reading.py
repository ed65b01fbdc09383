"""What a plan's model reads: files, its own text, or the short text that comes with Poise."""

import dataclasses

import pytest
from test_quantize import contents

import poise
from poise.checkpoints import open_checkpoint
from poise.core.errors import PoiseWarning, UsageError
from poise.core.plan import Plan, PlanRow
from poise.pipeline import reading, stream
from poise.pipeline.reading import PASSAGE, reading_of
from poise.pipeline.workspace import Workspace
from poise.planning.presets import preset_recipe
from poise.training.distill import distill_of


def plan_of(solver, **changes):
    row = PlanRow(
        name="w", role="ffn.up", rows=8, columns=64, format="q8_0", solver=solver, activations=None, reason=""
    )
    return Plan(recipe="r", exporter="gguf", rows=(row,), **changes)


def test_little_is_read_for_second_moments_and_own_text_for_hessians(llama):
    checkpoint = open_checkpoint(llama)
    assert reading_of(checkpoint, plan_of("search"), None).text.name == "the built-in calibration text"
    assert reading_of(checkpoint, plan_of("gptq"), None).text is None
    assert (
        reading_of(checkpoint, plan_of("gptq", tokens=1024), None).text.name
        == "the built-in calibration text"
    )
    assert reading_of(checkpoint, plan_of("gptq", tokens=4096), None).text is None
    assert reading_of(checkpoint, plan_of("search"), "self").text is None
    assert reading_of(checkpoint, plan_of("rtn", tune="distill"), None).text is None


def test_a_model_without_room_reads_the_built_in_text_and_says_so(llama, monkeypatch):
    monkeypatch.setattr(reading, "available_memory", lambda: 1000)
    with pytest.warns(PoiseWarning, match="give --calibration FILE"):
        found = reading_of(open_checkpoint(llama), plan_of("gptq"), None)
    assert found.text is not None


def test_the_built_in_text_has_what_the_preset_without_data_reads(llama):
    checkpoint = open_checkpoint(llama)
    tokens = preset_recipe("fast", 4, 32, quick=False).tokens
    found = reading_of(checkpoint, plan_of("gptq", tokens=tokens), None)
    assert sum(map(len, found.given)) == tokens


def test_hashes_tell_texts_apart(llama, tmp_path):
    checkpoint = open_checkpoint(llama)
    (tmp_path / "a.txt").write_text("some text")
    readings = [reading_of(checkpoint, plan_of("gptq"), source) for source in (None, tmp_path / "a.txt")] + [
        reading_of(checkpoint, plan_of("gptq", tokens=4096), None)
    ]
    assert len({item.hash for item in readings}) == 3


def test_training_reads_as_much_as_it_uses_of_a_text_and_less_of_what_the_model_writes(llama, tmp_path):
    plan = plan_of("gptq", tokens=1024, tune="distill(steps=10, batch=512, held=0.2, reads=4)")
    (tmp_path / "a.txt").write_text("some text")
    assert reading_of(open_checkpoint(llama), plan, tmp_path / "a.txt").tokens == 6400
    assert reading_of(open_checkpoint(llama), plan, "self").tokens == 1600


def test_of_its_own_text_a_model_writes_no_more_than_is_worth_waiting_for(llama, tmp_path):
    checkpoint, plan = open_checkpoint(llama), plan_of("gptq", tokens=100_000)
    own = reading_of(checkpoint, plan, "self")
    assert own.lacking == reading.WRITES // own.length
    (tmp_path / "a.txt").write_text("some text")
    assert reading_of(checkpoint, plan, tmp_path / "a.txt").tokens == 100_000
    trained = plan_of("gptq", tokens=100_000, tune="distill(steps=10, batch=512)")
    assert reading_of(checkpoint, trained, "self").tokens == 100_000


def test_what_a_text_lacks_for_training_is_written_and_read_after_it(llama, tmp_path):
    """Ten steps of 512 tokens that read a window at most twice want 2560 tokens; the text has 1100 of them."""
    plan = plan_of("gptq", tokens=256, tune="distill(steps=10, batch=512, held=0.0, reads=2)")
    (tmp_path / "a.txt").write_text("some words " * 100)
    text = reading_of(open_checkpoint(llama), plan, tmp_path / "a.txt")
    found = text.calibration(Workspace(tmp_path / "out", {}), lambda *_: None)
    assert len(found.windows) + len(found.written) == 2560 // text.length
    assert 0 < len(found.windows) < 10
    assert all(len(window) == text.length for window in found.written)
    assert text.lacking == len(found.written)
    assert found.first(len(found.windows) * text.length).windows == found.windows
    more = found.first((len(found.windows) + 1) * text.length)
    assert more.windows == [*found.windows, found.written[0]]
    assert not more.written
    assert len(found.first(10**6).windows) == 2560 // text.length
    enough = dataclasses.replace(plan, tune="distill(steps=1, batch=128, held=0.0, reads=2)")
    text = reading_of(open_checkpoint(llama), enough, tmp_path / "a.txt")
    assert not text.calibration(Workspace(tmp_path / "other", {}), lambda *_: None).written


def test_what_is_written_goes_on_from_windows_that_do_not_judge(llama, tmp_path):
    """A fifth of all windows judges: the last of the text, of which nothing may be trained."""
    plan = plan_of("gptq", tokens=256, tune="distill(steps=10, batch=512, held=0.2, reads=2)")
    (tmp_path / "a.txt").write_text(" ".join(f"word{number}" for number in range(150)))
    text = reading_of(open_checkpoint(llama), plan, tmp_path / "a.txt")
    found = text.calibration(Workspace(tmp_path / "out", {}), lambda *_: None)
    judging = distill_of(plan.tune).judging(len(found.windows) + len(found.written))
    assert 0 < judging < len(found.windows) < len(found.written)
    taught = [window[:PASSAGE] for window in found.windows[:-judging]]
    assert [window[:PASSAGE] for window in found.written] == [
        taught[place % len(taught)] for place in range(len(found.written))
    ]
    assert len({tuple(window) for window in found.written}) == len(found.written)
    (tmp_path / "short.txt").write_text(" ".join(f"word{number}" for number in range(40)))
    short = reading_of(open_checkpoint(llama), plan, tmp_path / "short.txt")
    assert 0 < len(short.given) < judging, "all of them judge"
    assert short.lacking > 0
    assert short.passages == []


def test_own_text_is_written_once_and_kept_for_a_resumed_run(llama, tmp_path, monkeypatch):
    recipe = dataclasses.replace(preset_recipe("balanced", 4, 32, quick=False), tokens=3072)
    poise.quantize(llama, recipe, tmp_path / "whole", to="gguf")
    calls = []
    whole = reading.write_windows

    def counted(*args, **kwargs):
        calls.append(1)
        return whole(*args, **kwargs)

    monkeypatch.setattr(reading, "write_windows", counted)

    def fail(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(stream, "solve_matrix", fail)
        with pytest.raises(KeyboardInterrupt):
            poise.quantize(llama, recipe, tmp_path / "out", to="gguf")
    poise.quantize(llama, recipe, tmp_path / "out", to="gguf", resume=True)
    assert len(calls) == 1
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_a_conversation_file_is_read_through_the_template(model_factory, copy_of, tmp_path):
    (tmp_path / "chat.jsonl").write_text('{"messages": [{"role": "user", "content": "x"}]}')
    with pytest.raises(UsageError, match="no chat template"):
        poise.quantize(
            model_factory("llama"), "mobile", tmp_path / "out", calibration=tmp_path / "chat.jsonl"
        )
    assert not (tmp_path / "out.partial").exists()
