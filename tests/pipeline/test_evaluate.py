"""What was lost and saved: figures, gates, files, and the comparisons that are refused."""

import json
import math
import shutil

import pytest

import poise
from conftest import build_model
from poise.checkpoints import open_checkpoint
from poise.core.artifact import Artifact
from poise.core.comparison import DEFAULT_GATES
from poise.core.errors import CheckpointError, EngineError, MissingExtra, PoiseError, UsageError
from poise.core.plan import Option, Recipe, Rule
from poise.pipeline.quantize import _is_quantized_linear
from poise.pipeline.subjects import default_engine, probe

FAST = {"efficiency": False, "window": 48, "windows": 3}


@pytest.fixture(scope="module")
def made(model_factory, tmp_path_factory):
    """An artifact of the mobile recipe; tests that evaluate it change its card, so they take a copy."""
    out = tmp_path_factory.mktemp("made") / "small"
    poise.quantize(model_factory("llama", "bfloat16"), "mobile", out, to="compressed-tensors")
    return out


@pytest.fixture
def artifact(made, tmp_path):
    return shutil.copytree(made, tmp_path / "small")


def gates(comparison):
    return {gate.name: gate for gate in comparison.gates}


def test_a_model_against_itself_has_lost_nothing(llama):
    comparison = poise.evaluate(llama, llama, **FAST)
    assert comparison.value("kl") == pytest.approx(0, abs=1e-6)
    assert comparison.value("perplexity_ratio") == 1
    assert comparison.value("top1") == 1
    assert comparison.passed
    assert gates(comparison)["size_reduction"].value == 0
    assert gates(comparison)["size_reduction"].verdict == "missed"
    assert comparison.candidate == comparison.reference
    assert comparison.text.startswith("the built-in evaluation text (3 windows, 144 tokens)")


def test_a_quantized_model_has_finite_figures_and_every_gate(artifact, llama):
    comparison = poise.evaluate(artifact, llama, **FAST)
    recipe = Artifact.open(artifact).manifest.gates
    assert set(gates(comparison)) == {*DEFAULT_GATES, *recipe}
    assert {score.name for score in comparison.scores} == {"kl", "perplexity_ratio", "top1"}
    for score in comparison.scores:
        assert score.n == 3
        assert score.low <= score.value <= score.high
    assert 1e-6 < comparison.value("kl") < 0.1
    ratio = comparison.candidate.value("perplexity") / comparison.reference.value("perplexity")
    assert comparison.value("perplexity_ratio") == pytest.approx(ratio, rel=1e-9)
    assert {name: len(values) for name, values in comparison.samples.items()} == {
        "kl": 3,
        "perplexity_ratio": 3,
        "top1": 3,
        "perplexity": 3,
        "reference_perplexity": 3,
    }
    size = gates(comparison)["size_reduction"].value
    manifest = Artifact.open(artifact).manifest
    assert size == pytest.approx(1 - manifest.weight_bytes / manifest.source_bytes)
    linear = gates(comparison)["linear_reduction"].value
    assert linear == pytest.approx(1 - manifest.linear_bits_per_weight / 16)


def test_what_is_not_measured_says_so_and_decides_nothing(artifact, llama):
    comparison = poise.evaluate(artifact, llama, **FAST)
    for name in ("memory_reduction", "latency_reduction", "decode_speedup"):
        assert math.isnan(gates(comparison)[name].value)
        assert gates(comparison)[name].verdict == "not measured"
    assert comparison.passed


def test_kl_is_that_of_both_models_on_the_same_tokens(artifact, llama):
    """Once more without the pipeline."""
    import torch

    from poise.calibration.text import load_text
    from poise.engines.torch import Torch

    comparison = poise.evaluate(artifact, llama, **FAST)
    original = open_checkpoint(llama)
    windows = load_text(None, "evaluation").windows(original.tokenizer(), 48, 3)
    with Torch() as a, Torch() as b:
        a.load(original)
        b.load(open_checkpoint(Artifact.open(artifact).model))
        p = torch.cat([a.logits(window)[:-1] for window in windows]).double().log_softmax(-1)
        q = torch.cat([b.logits(window)[:-1] for window in windows]).double().log_softmax(-1)
    assert comparison.value("kl") == pytest.approx(float((p.exp() * (p - q)).sum(-1).mean()), rel=1e-3)
    following = torch.tensor([token for window in windows for token in window[1:]])
    surprise = -q.gather(1, following[:, None]).mean()
    assert comparison.candidate.value("perplexity") == pytest.approx(float(surprise.exp()), rel=1e-5)


def sharp(folder):
    """A copy of a model whose scores are far apart, as those of trained models are."""
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    tensors["lm_head.weight"] *= 40
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


def test_a_destroyed_model_does_not_pass(llama, copy_of, tmp_path):
    original = sharp(copy_of(llama))
    rule = Rule(options=(Option(format="int(bits=1, group=64, symmetric=False)"),), role="[!he]*")
    keep = Rule(options=())
    recipe = Recipe(name="ruin", description="", rules=(rule, keep))
    poise.quantize(original, recipe, tmp_path / "ruined", to="compressed-tensors")
    assert any(_is_quantized_linear(row) for row in Artifact.open(tmp_path / "ruined").plan.quantized)
    comparison = poise.evaluate(tmp_path / "ruined", original, **FAST)
    assert not comparison.passed
    assert gates(comparison)["kl"].verdict == "missed"
    assert comparison.value("top1") < 0.9


def test_a_model_without_scores_on_some_window_does_not_pass(llama, monkeypatch):
    """What is left would look perfect."""
    from poise.engines.torch import Torch

    whole, calls = Torch.logits, []

    def broken(self, tokens):
        calls.append(tokens)
        return whole(self, tokens) * (math.nan if len(calls) == 4 else 1)  # the candidate's second window

    monkeypatch.setattr(Torch, "logits", broken)
    comparison = poise.evaluate(llama, llama, **FAST)
    assert [(score.n, score.n_unscored) for score in comparison.scores] == [(2, 1)] * 3
    assert gates(comparison)["kl"].verdict == "not measured"
    assert not comparison.passed


def test_the_report_is_written_whole(artifact, llama, tmp_path):
    comparison = poise.evaluate(artifact, llama, out=tmp_path / "deep" / "report", **FAST)
    folder = tmp_path / "deep" / "report"
    assert {p.name for p in folder.iterdir()} == {"report.json", "report.md", "quality.svg"}

    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    record = json.loads((folder / "report.json").read_text(), parse_constant=refuse)
    assert record["passed"] is True
    assert record["schema_version"] == 1
    found = {gate["name"]: gate for gate in record["gates"]}
    assert found["latency_reduction"]["value"] is None
    assert found["latency_reduction"]["verdict"] == "not measured"
    assert found["kl"]["value"] == comparison.value("kl")
    assert len(record["samples"]["kl"]) == 3
    for name in ("report.json", "report.md", "quality.svg"):
        assert str(tmp_path) not in (folder / name).read_text().replace(
            record["reference"]["source"], ""
        ).replace(record["candidate"]["source"], "")
    assert "small against" in (folder / "report.md").read_text()


def test_the_card_gets_the_figures_and_the_manifest_stays_true(artifact, llama):
    assert "Not evaluated yet" in (artifact / "README.md").read_text()
    before = Artifact.open(artifact)
    comparison = poise.evaluate(artifact, llama, **FAST)
    after = Artifact.open(artifact)
    card = (artifact / "README.md").read_text()
    assert "Not evaluated yet" not in card
    assert f"{comparison.value('kl'):.4g}" in card
    assert comparison.command in card
    assert "nan" not in card
    assert after.damaged() == []
    changed = [
        name for name in after.manifest.files if after.manifest.files[name] != before.manifest.files[name]
    ]
    assert changed == ["README.md"]
    poise.evaluate(artifact, llama, **FAST)
    assert (artifact / "README.md").read_text() == card


def test_a_damaged_artifact_is_not_evaluated_into_an_undamaged_one(artifact, llama):
    with open(artifact / "plan.json", "a") as file:
        file.write("\n")
    with pytest.raises(CheckpointError, match=r"plan\.json differ from the manifest"):
        poise.evaluate(artifact, llama, **FAST)
    assert Artifact.open(artifact).damaged() == ["plan.json"]


def test_a_card_that_its_owner_wrote_on_does_not_stop_an_evaluation(artifact, llama):
    (artifact / "README.md").write_text("mine")
    poise.evaluate(artifact, llama, **FAST)
    assert Artifact.open(artifact).damaged() == []


@pytest.mark.parametrize("size", [300, 340])
def test_other_vocabularies_are_refused(llama, tmp_path, size):
    other = build_model(tmp_path / "other", "llama", vocab_size=size)
    with pytest.raises(PoiseError, match=f"vocabularies of 320 and {size} tokens cannot be compared"):
        poise.evaluate(other, llama, out=tmp_path / "report", **FAST)
    with pytest.raises(PoiseError, match=f"vocabularies of {size} and 320 tokens cannot be compared"):
        poise.evaluate(llama, other, out=tmp_path / "report", **FAST)
    assert not (tmp_path / "report").exists()


def test_the_calibration_text_is_no_evaluation_text(llama, tmp_path):
    words = "the cat sat on the mat and then the other cat sat there too. " * 20
    (tmp_path / "calibration.txt").write_text(words)
    (tmp_path / "copy.txt").write_text(words)
    (tmp_path / "other.txt").write_text(
        "a river runs through green hills while birds sing above quiet water. " * 20
    )
    poise.quantize(llama, "mobile", tmp_path / "small", calibration=tmp_path / "calibration.txt")
    with pytest.raises(UsageError, match=r"copy\.txt is what the model was calibrated on"):
        poise.evaluate(tmp_path / "small", llama, text=tmp_path / "copy.txt", **FAST)
    comparison = poise.evaluate(
        tmp_path / "small", llama, text=tmp_path / "other.txt", engine="torch", **FAST
    )
    assert comparison.text.startswith("other.txt (3 windows")
    assert "--text other.txt" in comparison.command


def test_an_engine_that_does_not_read_the_kind_is_refused(llama):
    with pytest.raises(EngineError, match="the engine llamacpp reads gguf, this is huggingface"):
        poise.evaluate(llama, llama, engine="llamacpp", **FAST)
    with pytest.raises(UsageError, match="no engine named 'lamacpp': did you mean 'llamacpp'"):
        poise.evaluate(llama, llama, engine="lamacpp", **FAST)


def test_a_report_in_the_place_of_a_file_is_refused_before_the_work(llama, tmp_path, monkeypatch):
    (tmp_path / "report").write_text("mine")

    def load(self, checkpoint):
        raise AssertionError("too late")

    monkeypatch.setattr("poise.engines.torch.Torch.load", load)
    with pytest.raises(UsageError, match="report is a file; name a folder"):
        poise.evaluate(llama, llama, out=tmp_path / "report", **FAST)


def test_windows_are_no_longer_than_either_model_was_made_for(llama, tmp_path):
    short = build_model(tmp_path / "short", "llama", max_position_embeddings=40)
    comparison = poise.evaluate(short, llama, efficiency=False, windows=2)
    assert "(2 windows, 80 tokens)" in comparison.text
    assert "windows of 40 tokens" in comparison.scores[0].protocol


def test_the_command_gives_the_same_figures_again(llama):
    comparison = poise.evaluate(llama, llama, engine="torch(dtype='bfloat16')", **FAST)
    assert comparison.command == (
        f"poise evaluate {llama.name} --reference {llama.name} --window 48 --windows 3 "
        """--engine 'torch(dtype='"'"'bfloat16'"'"')'"""
    )
    assert comparison.value("kl") > 0, "the candidate's engine is the reference's"


def test_models_here_and_above_have_names(made, llama, monkeypatch, tmp_path):
    folder = shutil.copytree(made, tmp_path / "named")
    monkeypatch.chdir(folder)
    assert poise.evaluate(".", llama, **FAST).candidate.label == "named"


def test_gguf_runs_in_llama_cpp_if_it_is_there(llama, tmp_path, monkeypatch):
    (artifact,) = poise.quantize(llama, "float16", tmp_path / "f16")
    checkpoint = open_checkpoint(artifact.model)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    assert default_engine(checkpoint) == "llamacpp"
    assert default_engine(open_checkpoint(llama)) == "torch"
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert default_engine(checkpoint) == "torch"


def test_llama_cpp_and_torch_agree_about_a_gguf_file(llama, tmp_path):
    pytest.importorskip("xllamacpp")
    (artifact,) = poise.quantize(llama, "float16", tmp_path / "f16")
    comparison = poise.evaluate(artifact.path, artifact.path, reference_engine="torch", **FAST)
    assert (comparison.reference.engine, comparison.candidate.engine) == ("torch", "llamacpp")
    assert comparison.value("kl") < 1e-4


def test_a_missing_runtime_says_how_to_install_it(llama, tmp_path, monkeypatch):
    (artifact,) = poise.quantize(llama, "float16", tmp_path / "f16")

    def missing(self, checkpoint):
        raise MissingExtra("xllamacpp", "llamacpp")

    monkeypatch.setattr("poise.engines.llamacpp.LlamaCpp.load", missing)
    with pytest.raises(MissingExtra, match=r"pip install 'poise\[llamacpp\]'"):
        poise.evaluate(artifact.path, llama, engine="llamacpp", **FAST)


def test_bench_takes_an_engine_for_each_model_or_none(llama):
    with pytest.raises(UsageError, match="2 models but 1 engines"):
        poise.bench([llama, llama], ["torch"])


def test_a_probe_sees_memory_grow(llama):
    memory = probe(llama, "torch")
    assert 0 < memory["before"] <= memory["peak"]


def test_models_in_dtypes_without_arithmetic_are_measured_in_float32(tmp_path):
    from poise.pipeline.subjects import native

    checkpoint = open_checkpoint(build_model(tmp_path / "m", "llama", "float64"))
    assert native("torch", checkpoint) == "torch(dtype='float32')"
    assert native("llamacpp", checkpoint) == "llamacpp"


@pytest.mark.slow
def test_efficiency_of_all_that_is_measured(llama, tmp_path):
    """The whole story, in the engines that users get."""
    poise.quantize(llama, "mobile", tmp_path / "small")
    seen = []
    comparison = poise.evaluate(
        tmp_path / "small",
        llama,
        window=48,
        windows=2,
        out=tmp_path / "report",
        progress=lambda stage, done, total: seen.append((stage, done, total)),
    )
    for side in (comparison.reference, comparison.candidate):
        names = ["perplexity", "memory", "size", "bits_per_weight"]
        for name in (*names, "time_to_first_token", "time_per_token", "throughput"):
            assert side.value(name) > 0, (side.label, name)
    found = gates(comparison)
    before, after = (side.value("time_per_token") for side in (comparison.reference, comparison.candidate))
    assert found["latency_reduction"].value == pytest.approx(1 - after / before)
    assert found["decode_speedup"].value == pytest.approx(before / after)
    assert "not measured" not in {gate.verdict for gate in comparison.gates}
    assert ("evaluate", 2, 2) in seen
    assert "measure latency" in {stage for stage, _, _ in seen}
    protocols = {score.name: score.protocol for score in comparison.reference.scores}
    for name in ("memory", "time_per_token"):
        assert protocols[name].endswith("engine torch(dtype='bfloat16')"), "the dtype it is stored in"


def test_a_text_that_shares_passages_with_the_calibration_is_refused(llama, tmp_path):
    from poise.calibration.text import load_text

    known = load_text(None, "calibration").content
    other = load_text(None, "evaluation").content
    (artifact,) = poise.quantize(llama, "mobile", tmp_path / "out")
    mixed = tmp_path / "mixed.txt"
    mixed.write_text(other[:600] + " " + known[200:500] + " " + other[600:1200])
    settings = {**FAST, "windows": 100}
    with pytest.raises(UsageError, match=r"mixed\.txt shares \d+% of its passages"):
        poise.evaluate(artifact.path, llama, text=mixed, **settings)
    mixed.write_text(other[:1200])
    assert poise.evaluate(artifact.path, llama, text=mixed, **settings).value("kl") >= 0


def test_cost_follows_from_price_and_speed(llama):
    (side,) = poise.bench([llama], ["fake(vocabulary=320)"], price=1.8)
    assert side.value("throughput") == pytest.approx(100)
    assert side.value("cost_per_million_tokens") == pytest.approx(5)
