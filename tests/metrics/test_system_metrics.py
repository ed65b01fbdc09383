"""What a model costs: bytes from the disk, memory from a probe, times from engines that take turns."""

import json
import math
import sys

import pytest

from poise.checkpoints import open_checkpoint
from poise.core.engine import Engine, Generation
from poise.core.metric import Subject
from poise.metrics import energy
from poise.metrics.energy import Energy
from poise.metrics.kv_cache import KvCache
from poise.metrics.latency import ENOUGH, GENERATED, PROMPT, ROUNDS, TOGETHER, TURNS, Latency
from poise.metrics.memory import Memory
from poise.metrics.size import Size


def subject(checkpoint=None, start=None, probe=(), label="model"):
    return Subject(
        label=label, checkpoint=checkpoint, engine=f"scripted-{label}", start=start, probe=list(probe)
    )


def by_name(scores):
    return {score.name: score for score in scores}


def test_size_is_what_the_file_holds_beside_its_header(llama):
    (scores,) = Size().measure([subject(open_checkpoint(llama))])
    file = llama / "model.safetensors"
    header = 8 + int.from_bytes(file.read_bytes()[:8], "little")
    assert by_name(scores)["size"].value == file.stat().st_size - header
    assert by_name(scores)["bits_per_weight"].value == 16


def test_size_of_a_quantized_model_counts_scales(llama, tmp_path):
    import poise

    (artifact,) = poise.quantize(llama, "mobile", tmp_path / "out", to="compressed-tensors")
    before, after = Size().measure(
        [subject(open_checkpoint(llama)), subject(open_checkpoint(artifact.model))]
    )
    file = artifact.path / artifact.manifest.model / "model.safetensors"
    header = 8 + int.from_bytes(file.read_bytes()[:8], "little")
    assert by_name(after)["size"].value == file.stat().st_size - header
    assert by_name(after)["size"].value < by_name(before)["size"].value
    assert by_name(after)["bits_per_weight"].value == pytest.approx(artifact.manifest.bits_per_weight)


def printing(text, code=0):
    return [sys.executable, "-c", f"print({text!r}); raise SystemExit({code})"]


def test_memory_is_what_the_probe_took():
    probe = printing("advice of a library\n" + json.dumps({"before": 100, "peak": 350}))
    ((score,),) = Memory().measure([subject(probe=probe)])
    assert (score.name, score.value, score.unit) == ("memory", 250.0, "bytes")
    assert (score.n, score.n_unscored) == (1, 0)
    assert "scripted-model" in score.protocol


@pytest.mark.parametrize(
    "probe",
    [
        printing(json.dumps({"before": 100, "peak": 350}), code=1),
        printing("killed"),
        printing("[]"),
        printing('{"before": 100}'),
        [sys.executable, "-c", "pass"],
    ],
    ids=["failed", "no json", "no object", "no peak", "silent"],
)
def test_a_probe_that_fails_is_counted_and_not_a_number(probe):
    good = printing(json.dumps({"before": 1, "peak": 2}))
    (failed,), (other,) = Memory().measure([subject(probe=probe), subject(probe=good)])
    assert math.isnan(failed.value)
    assert (failed.n, failed.n_unscored) == (0, 1)
    assert other.value == 1


class Scripted(Engine):
    """Answers with the times it was given, one list of seconds a call, and writes down its calls."""

    def __init__(self, name, calls, script):
        self.name, self.calls, self.script = name, calls, iter(script)

    def load(self, checkpoint):
        raise NotImplementedError

    def logits(self, tokens):
        raise NotImplementedError

    def generate(self, tokens, n):
        self.calls.append((self.name, len(tokens), n))
        seconds = next(self.script)
        if isinstance(seconds, Exception):
            raise seconds
        return Generation(tokens=[0] * len(seconds), seconds=seconds)

    def generate_many(self, prompts, n):
        assert len({tuple(tokens) for tokens in prompts}) == len(prompts), "caches of prompts would help"
        self.calls.append((self.name, len(prompts), n))
        return [[0] * n for _ in prompts]

    def close(self):
        self.calls.append((self.name, "closed"))


def steady(first, step):
    return [first + step * i for i in range(4)]


FIRST = [100.0, 0.5, 0.1, 0.3, 0.2, 0.4]
STEPS = [100.0, 0.01, 0.05, 0.02, 0.04, 0.03]
"""The warm-up, then five rounds whose order is not that of their sizes."""


def script(scale=1.0):
    return [steady(scale * first, scale * step) for first, step in zip(FIRST, STEPS, strict=True)]


def test_models_take_turns_and_the_warm_up_is_not_counted():
    calls = []
    assert len(FIRST) == ROUNDS + 1
    subjects = [
        subject(start=lambda: Scripted("a", calls, script()), label="a"),
        subject(start=lambda: Scripted("b", calls, script(scale=3)), label="b"),
    ]
    a, b = map(by_name, Latency().measure(subjects))
    turns = [("a", PROMPT, GENERATED), ("b", PROMPT, GENERATED)] * (ROUNDS + 1)
    turns += [(name, n, GENERATED) for n in TOGETHER for _ in range(TURNS + 1) for name in "ab"]
    assert calls[: len(turns)] == turns
    assert sorted(calls[len(turns) :]) == [("a", "closed"), ("b", "closed")]
    first, step = a["time_to_first_token"], a["time_per_token"]
    assert (first.value, first.low, first.high) == pytest.approx((0.3, 0.1, 0.5))
    assert (step.value, step.low, step.high) == pytest.approx((0.03, 0.01, 0.05))
    rates = sorted(4 / (f + 3 * s) for f, s in zip(FIRST[1:], STEPS[1:], strict=True))
    assert a["throughput"].value == pytest.approx(rates[2])
    assert (a["throughput"].low, a["throughput"].high) == pytest.approx((rates[0], rates[-1]))
    assert {a[name].n for name in ("time_to_first_token", "time_per_token", "throughput")} == {ROUNDS}
    assert a["throughput"].rounds == pytest.approx(
        tuple(4 / (f + 3 * s) for f, s in zip(FIRST[1:], STEPS[1:], strict=True))
    )
    assert b["time_to_first_token"].value == pytest.approx(0.9)
    assert b["time_per_token"].value == pytest.approx(0.09)
    assert b["throughput"].protocol.endswith("engine scripted-b")
    assert {a[f"throughput_at_{n}"].n for n in TOGETHER} == {TURNS}
    assert "16 streams" in a["throughput_at_16"].protocol


def test_engines_are_closed_when_one_of_them_fails():
    calls = []
    subjects = [
        subject(start=lambda: Scripted("a", calls, script())),
        subject(start=lambda: Scripted("b", calls, [steady(1, 1), RuntimeError("out of memory")])),
    ]
    with pytest.raises(RuntimeError, match="out of memory"):
        Latency().measure(subjects)
    assert {("a", "closed"), ("b", "closed")} <= set(calls)


def test_engines_are_closed_when_a_later_one_does_not_start():
    calls = []

    def refuse():
        raise RuntimeError("no such model")

    with pytest.raises(RuntimeError, match="no such model"):
        Latency().measure([subject(start=lambda: Scripted("a", calls, script())), subject(start=refuse)])
    assert calls == [("a", "closed")]


def test_gaps_between_tokens_have_percentiles_and_the_last_one_takes_a_thousand():
    (scores,) = Latency().measure([subject(start=lambda: Scripted("a", [], script()))])
    found = by_name(scores)
    assert found["inter_token_latency_p50"].value == pytest.approx(0.03)
    assert found["inter_token_latency_p95"].value == pytest.approx(0.05)
    refused = found["inter_token_latency_p99"]
    assert math.isnan(refused.value)
    assert (refused.n, refused.n_unscored) == (0, 3 * ROUNDS)
    assert f"refused: 15 of the {ENOUGH}" in refused.protocol
    long = [[0.0, *(0.001 * (k + 1) for k in range(250))] for _ in range(ROUNDS + 1)]
    (scores,) = Latency().measure([subject(start=lambda: Scripted("a", [], long))])
    many = by_name(scores)["inter_token_latency_p99"]
    assert many.low <= many.value <= many.high
    assert many.n == 1250


def test_keys_and_values_of_grouped_heads(llama):
    ((score,),) = KvCache().measure([subject(open_checkpoint(llama))])
    assert score.value == 2 * 2 * 2 * 16 * 2  # two of each, layers, key-value heads, head, bytes


def test_a_configuration_that_does_not_tell_is_not_guessed(llama):
    checkpoint = open_checkpoint(llama)
    checkpoint.config = {"model_type": "llama"}
    ((score,),) = KvCache().measure([subject(checkpoint)])
    assert math.isnan(score.value)
    assert score.n_unscored == 1


def test_energy_is_counted_or_not_available(tmp_path, monkeypatch):
    monkeypatch.setattr(energy, "COUNTERS", tmp_path)
    ((score,),) = Energy().measure([subject(start=lambda: pytest.fail("needs no model"))])
    assert math.isnan(score.value)
    assert "not available" in score.protocol
    counter = tmp_path / "intel-rapl:0" / "energy_uj"
    counter.parent.mkdir()
    counter.write_text("1000000")

    class Hungry(Scripted):
        def generate(self, tokens, n):
            counter.write_text(str(int(counter.read_text()) + 640_000))
            return Generation(tokens=[0] * n, seconds=[0.1] * n)

    ((score,),) = Energy().measure([subject(start=lambda: Hungry("a", [], []))])
    assert score.value == pytest.approx(0.01)
    assert score.n == 1
