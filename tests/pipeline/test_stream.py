"""Solving block by block: what is collected, what layers read, and that nothing depends on how it is cut."""

import dataclasses
import json

import pytest
import torch
from test_quantize import contents

import poise
from poise.checkpoints import open_checkpoint
from poise.core.solver import Solver
from poise.pipeline import passes, stream
from poise.pipeline.moments import Moments
from poise.pipeline.spool import Spool
from poise.planning.presets import preset_recipe
from poise.solvers.rtn import Rtn
from poise.training.distill import Distill

RECIPE = preset_recipe("balanced", 3, 32, quick=False)


@pytest.fixture
def stats_seen(monkeypatch):
    """name -> statistics that the solver got."""
    seen = {}
    whole = Solver.solve

    def noting(self, weight, format, stats=None, name="", start=None):
        if stats is not None:
            seen[name] = stats
        return whole(self, weight, format, stats, name, start)

    monkeypatch.setattr(Solver, "solve", noting)
    from poise.core.solver import Chain

    monkeypatch.setattr(Chain, "solve", noting, raising=False)
    return seen


def outcomes(folder):
    record = json.loads(folder.with_name(folder.name + ".run.json").read_text())
    return {item["name"]: item for item in record["matrices"]}


def test_statistics_do_not_depend_on_the_batch(llama, tmp_path, stats_seen, monkeypatch):
    first = {}
    for batch in (4096, 700):
        monkeypatch.setattr(stream, "BATCH_TOKENS", batch)
        poise.quantize(llama, RECIPE, tmp_path / str(batch), to="compressed-tensors")
        first = first or dict(stats_seen)
    name = "model.layers.0.self_attn.q_proj.weight"  # later ones read codes that rounding errors may flip
    assert torch.allclose(first[name].hessian, stats_seen[name].hessian, rtol=1e-4, atol=1e-6)
    assert torch.allclose(first[name].cross, stats_seen[name].cross, rtol=1e-4, atol=1e-6)
    assert first[name].n_tokens == stats_seen[name].n_tokens


@pytest.mark.parametrize(("rounded", "tolerance"), [(False, 1e-4), (True, 0.02)])
def test_statistics_are_those_of_the_whole_model(
    llama, tmp_path, stats_seen, monkeypatch, rounded, tolerance
):
    """The original's inputs, hooked in the model as transformers runs it."""
    monkeypatch.setattr(stream, "ROUNDED", rounded)
    poise.quantize(llama, "mobile", tmp_path / "out")
    from poise.calibration.text import load_text
    from poise.core.registry import get

    checkpoint = open_checkpoint(llama)
    windows = load_text(None, "calibration").windows(checkpoint.tokenizer(), 128)
    sums = {}
    with get("engine", "torch")(dtype="float32") as engine:
        engine.load(checkpoint)
        for name in ("model.layers.1.mlp.down_proj", "model.layers.0.self_attn.o_proj", "lm_head"):
            engine.model.get_submodule(name).register_forward_pre_hook(
                lambda _, args, name=name: sums.setdefault(name, []).append(
                    args[0][0].double().square().mean(0)
                )
            )
        used = stats_seen["lm_head.weight"].n_tokens // 128
        for window in windows[:used]:
            engine.logits(window)
    for name, parts in sums.items():
        expected = torch.stack(parts).mean(0)
        assert torch.allclose(stats_seen[f"{name}.weight"].second_moment.double(), expected, rtol=tolerance)


def test_layers_read_what_quantized_layers_give(llama, tmp_path, stats_seen):
    poise.quantize(llama, RECIPE, tmp_path / "out", to="compressed-tensors")
    first = stats_seen["model.layers.0.self_attn.q_proj.weight"]
    assert torch.equal(first.hessian, first.cross)  # nothing is quantized before it
    begun = tuple(f"model.layers.0.self_attn.{letter}_proj.weight" for letter in "qkv")
    for name, stats in stats_seen.items():
        assert torch.equal(stats.hessian, stats.cross) == (name in begun), name


def test_layers_learn_what_the_stream_has_lost(model_factory, tmp_path, stats_seen, monkeypatch):
    """Of what the down projection of the first block is added to: the attention output that was quantized before it."""
    from poise.calibration.text import load_text
    from poise.pipeline.blocks import Blocks

    monkeypatch.setattr(stream, "ROUNDED", False)
    llama, text = model_factory("llama"), load_text(None, "calibration")
    file = tmp_path / "text.txt"
    file.write_text(text.content, encoding="utf-8")
    poise.quantize(llama, RECIPE, tmp_path / "out", to="compressed-tensors", calibration=file)
    drifts = {name: stats.drift for name, stats in stats_seen.items()}
    assert {name.split(".", 3)[3] for name, drift in drifts.items() if drift is not None} == {
        "self_attn.o_proj.weight",
        "mlp.down_proj.weight",
    }
    assert not drifts["model.layers.0.self_attn.o_proj.weight"].any()  # nothing was quantized yet
    original, changed = open_checkpoint(llama), open_checkpoint(tmp_path / "out")
    name, states = "model.layers.0.mlp.down_proj", {}
    length = min(512, original.context)
    count = stats_seen[f"{name}.weight"].n_tokens // length
    windows = text.windows(original.tokenizer(), length, count)
    for checkpoint in (original, changed):
        blocks = Blocks(checkpoint)
        (hidden,) = blocks.begin(windows, len(windows))
        blocks.open(0)
        layer = blocks.layers[0]
        layer.mlp.down_proj.register_forward_pre_hook(
            lambda _, args, to=states.setdefault(checkpoint, {}): to.update(x=args[0].flatten(0, 1))
        )
        layer.post_attention_layernorm.register_forward_pre_hook(
            lambda _, args, to=states[checkpoint]: to.update(stream=args[0].flatten(0, 1))
        )
        blocks.run(hidden)
    x = states[changed]["x"]
    lost = states[original]["stream"] - states[changed]["stream"]
    expected = lost.T @ x / len(x)
    found = drifts[f"{name}.weight"]
    assert float((found - expected).norm()) < 0.05 * float(expected.norm())


def test_every_matrix_is_better_than_rounding_to_nearest(llama, tmp_path):
    poise.quantize(llama, RECIPE, tmp_path / "out", to="compressed-tensors")
    found = outcomes(tmp_path / "out")
    assert len(found) == 14
    for item in found.values():
        assert item["output_error"] < 0.85 * item["nearest"]
        assert item["seconds"] > 0
        assert item["tokens"] > 0


@pytest.mark.parametrize("preset", ["balanced", "best"])
def test_a_run_that_was_interrupted_anywhere_resumes_to_the_same_bytes(llama, tmp_path, monkeypatch, preset):
    recipe = preset_recipe(preset, 3, 32, quick=False)
    if recipe.tune:
        recipe = dataclasses.replace(recipe, tune="distill(steps=4, every=2)", tokens=4096)
    poise.quantize(llama, recipe, tmp_path / "whole", to="compressed-tensors")
    whole = stream.solve_matrix
    for after in (1, 5, 3):
        left = [after]

        def interrupted(*args, left=left):
            if not left[0]:
                raise KeyboardInterrupt
            left[0] -= 1
            return whole(*args)

        monkeypatch.setattr(stream, "solve_matrix", interrupted)
        with pytest.raises(KeyboardInterrupt):
            poise.quantize(llama, recipe, tmp_path / "out", to="compressed-tensors", resume=True)
    monkeypatch.setattr(stream, "solve_matrix", whole)
    poise.quantize(llama, recipe, tmp_path / "out", to="compressed-tensors", resume=True)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_a_run_interrupted_while_it_tunes_reads_no_block_again(llama, tmp_path, monkeypatch):
    recipe = dataclasses.replace(
        preset_recipe("best", 3, 32, quick=False), tune="distill(steps=4, every=2)", tokens=4096
    )
    poise.quantize(llama, recipe, tmp_path / "whole", to="compressed-tensors")
    whole = Distill.run

    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(Distill, "run", interrupted)
    with pytest.raises(KeyboardInterrupt):
        poise.quantize(llama, recipe, tmp_path / "out", to="compressed-tensors")
    monkeypatch.setattr(Distill, "run", whole)
    monkeypatch.setattr(stream._Stream, "run", lambda _: pytest.fail("reads the blocks again"))
    poise.quantize(llama, recipe, tmp_path / "out", to="compressed-tensors", resume=True)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_what_is_doubtful_is_in_the_record(model_factory, copy_of, tmp_path):
    """A norm that silences an input, and fewer tokens than a Hessian wants."""
    from safetensors.torch import load_file, save_file

    model = copy_of(model_factory("llama"))
    tensors = load_file(model / "model.safetensors")
    tensors["model.layers.0.input_layernorm.weight"][3] = 0
    save_file(tensors, model / "model.safetensors", {"format": "pt"})
    recipe = dataclasses.replace(RECIPE, tokens=128)
    poise.quantize(model, recipe, tmp_path / "out", to="compressed-tensors")
    found = outcomes(tmp_path / "out")
    said = " ".join(found["model.layers.0.self_attn.q_proj.weight"]["warnings"])
    assert "1 of 64 inputs were always zero" in said
    assert "poorly known" in said


def test_presets_shrink_every_architecture(model_factory, tmp_path):
    for name in ("mistral", "gpt2", "mixtral", "gemma3_text", "qwen3_moe", "phi3"):
        recipe = preset_recipe("balanced", 4, 32, quick=False)
        poise.quantize(model_factory(name), recipe, tmp_path / name, to="gguf")
        found = outcomes(tmp_path / name)
        better = [item["output_error"] < item["nearest"] for item in found.values() if item["tokens"]]
        assert len(better) > 4
        assert all(better)


def test_what_a_block_read_leaves_the_disk_with_the_block(llama, tmp_path, monkeypatch):
    """Nothing in memory: all inputs are spilled, and those of layers that are done are gone again."""
    monkeypatch.setattr(passes, "READ", 0)
    kept, inputs = [], tmp_path / "out.partial" / "stream" / "inputs"

    def seen(stage, done, total):
        if stage.startswith("quantize"):
            kept.append({path.name for path in inputs.iterdir()} if inputs.exists() else set())

    poise.quantize(llama, RECIPE, tmp_path / "out", to="compressed-tensors", progress=seen)
    # The input groups of one block, and the stream where two of them write.
    assert max(map(len, kept)) == 4 + 2
    assert kept[-1] <= {"model.layers.1.mlp.down_proj", "model.layers.1.mlp.down_proj.stream"}
    assert all(len({name.split(".")[2] for name in names}) <= 1 for names in kept)


def test_spool_gives_back_what_it_took_from_memory_and_from_disk(tmp_path):
    values = [
        torch.randn(5, number + 1, generator=torch.Generator().manual_seed(number)) for number in range(6)
    ]
    for budget in (0, 150, 1 << 20):
        spool = Spool(tmp_path / str(budget), budget)
        for value in values:
            spool.append(value)
        assert all(torch.equal(a, b) for a, b in zip(spool, values, strict=True))
        spool[2] = values[5]
        spool[5] = values[0]
        assert torch.equal(spool[2], values[5])
        assert torch.equal(spool[5], values[0])
        assert len(spool) == 6
        on_disk = list((tmp_path / str(budget)).glob("*")) if budget < 1 << 20 else []
        assert bool(on_disk) == (budget < 1 << 20)


def test_rounding_to_nearest_reads_nothing(llama, tmp_path, stats_seen):
    recipe = preset_recipe("balanced", 4, 32, quick=False)
    rules = tuple(dataclasses.replace(rule, solver="rtn") for rule in recipe.rules)
    poise.quantize(llama, dataclasses.replace(recipe, rules=rules), tmp_path / "out", to="gguf")
    assert not stats_seen
    assert isinstance(Rtn(), Solver)


def test_starved_experts_count_what_their_layer_reads(model_factory, tmp_path, stats_seen):
    """All tokens go to two experts of four: the others are solved for the average of the layer, which is said."""
    recipe = dataclasses.replace(preset_recipe("balanced", 4, 32, quick=False), tokens=1024)
    poise.quantize(model_factory("mixtral"), recipe, tmp_path / "out", to="gguf")
    experts = {
        name: stats for name, stats in stats_seen.items() if "experts" in name or "block_sparse" in name
    }
    assert experts
    starved = {
        name for name, stats in experts.items() if any("reached this expert" in note for note in stats.notes)
    }
    found = outcomes(tmp_path / "out")
    assert {
        name for name, item in found.items() if "reached this expert" in " ".join(item["warnings"])
    } == starved
    for name, stats in experts.items():
        assert stats.n_tokens >= 4 * len(stats.second_moment), name
        assert torch.allclose(stats.hessian.diagonal(), stats.second_moment, rtol=0.01)


def test_sharing_is_an_average_of_own_and_all():
    moments = Moments(None, {})
    own, other = (torch.randn(40, 8, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1))
    moments.add("mlp.experts.3", own[:10])
    moments.add("mlp.experts.gate_up", other)
    moments._share("mlp.experts.3", "mlp.experts.gate_up", 22)
    assert moments.count["mlp.experts.3"] == 32
    expected = own[:10].T @ own[:10] + 22 * (other.T @ other) / 40
    assert torch.allclose(moments.hessian["mlp.experts.3"], expected, atol=1e-4)
    moments._share("mlp.experts.0", "mlp.experts.gate_up", 32)
    assert torch.allclose(moments.hessian["mlp.experts.0"] / 32, other.T @ other / 40, atol=1e-5)
