"""transformers must compute with exactly the weights that were meant; vLLM's rules are checked as reasons.

`make verify-vllm` runs the same folders in vLLM itself.
"""

import json
import re
import stat
from dataclasses import replace

import pytest
import torch
from safetensors import safe_open
from torch import nn

from poise.checkpoints.huggingface import HuggingFaceCheckpoint
from poise.core.errors import ExportError
from poise.core.linear import Linear
from poise.core.plan import Plan, PlanRow
from poise.core.registry import build
from poise.exporters.compressed_tensors import CompressedTensors, model_config
from poise.layouts.compressed_tensors import patterns

W4 = "int(bits=4, group=32)"
W4_ASYM = "int(bits=4, group=32, symmetric=False)"
W3 = "int(bits=3, group=64)"
W8 = "int(bits=8, group='channel')"
DENSE = ("attention", "ffn")
FAMILIES = ("llama", "llama-tied", "qwen3", "phi3", "opt", "mixtral", "qwen3_moe")


def opened(folder):
    return HuggingFaceCheckpoint(folder, str(folder))


def everywhere(spec, activations=None, roles=(*DENSE, "expert")):
    """What a plan wants of a matrix: the same for all of these roles."""
    return lambda linear: (spec, activations) if linear.role.startswith(roles) else (None, None)


def plan_for(checkpoint, wish, scale):
    rows = []
    for linear in checkpoint.linears():
        spec, activations = wish(linear)
        if spec and spec.startswith("int"):
            spec = f"{spec[:-1]}, scale={scale!r})"
        rows.append(
            PlanRow(
                name=linear.name,
                role=linear.role,
                rows=linear.rows,
                columns=linear.columns,
                format=spec,
                solver="rtn()" if spec else None,
                activations=activations,
                reason="a test",
            )
        )
    return Plan(recipe="test", exporter="compressed-tensors", rows=tuple(rows))


def codes_for(checkpoint, plan):
    linears = {linear.name: linear for linear in checkpoint.linears()}
    solver = build("solver", "rtn")

    def codes(name):
        return solver.solve(checkpoint.read_matrix(linears[name]), build("format", plan.row(name).format))

    return codes


def export(source, folder, wish, **options):
    """(source checkpoint, plan, codes, exported folder)"""
    checkpoint, exporter = opened(source), CompressedTensors(**options)
    plan = plan_for(checkpoint, wish, exporter.scale_dtype(checkpoint))
    codes = codes_for(checkpoint, plan)
    folder.mkdir()
    assert exporter.export(checkpoint, plan, codes, folder) == folder
    return checkpoint, plan, codes, folder


def meant(checkpoint, plan, codes):
    """Every tensor of the model as it was meant."""
    tensors = {}
    for name in checkpoint.tensors():
        row, tensor = plan.row(name), checkpoint.read(name)
        quantized = row is not None and not row.kept
        tensors[name] = codes(name).decode().to(tensor.dtype).view(tensor.shape) if quantized else tensor
    return tensors


def round_tokens(_, args):
    """Per-token symmetric 8-bit rounding, as compressed-tensors does it in the dtype of the activation."""
    x = args[0]
    scale = x.abs().amax(-1, keepdim=True) / 127.5
    return ((x / scale).round().clamp(-128, 127) * scale,)


def expected_logits(checkpoint, plan, codes, tokens):
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(checkpoint.path)
    model = AutoModelForCausalLM._model_mapping[type(config)].from_pretrained(
        None, config=config, state_dict=meant(checkpoint, plan, codes), dtype=checkpoint.dtype
    )
    for row in plan.rows:
        if row.activations:
            model.get_submodule(row.name.removesuffix(".weight")).register_forward_pre_hook(round_tokens)
    with torch.no_grad():
        return model(tokens).logits


def loaded_logits(folder, dtype, tokens):
    from transformers import AutoModelForCausalLM

    model, report = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    with torch.no_grad():
        return model(tokens).logits


TOKENS = torch.arange(3, 43).view(2, 20)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("spec", [W4, W4_ASYM, W3, W8, "int(bits=2, group=16)", "int(bits=5, group=32)"])
def test_reading_back_gives_every_weight_bit_for_bit(model_factory, tmp_path, spec, dtype):
    wish = everywhere(spec, roles=DENSE)
    checkpoint, plan, codes, folder = export(model_factory("llama", dtype), tmp_path / "out", wish)
    back = opened(folder)
    wanted = meant(checkpoint, plan, codes)
    assert set(back.tensors()) == set(wanted)
    for name, tensor in wanted.items():
        assert back.read(name).dtype == tensor.dtype
        assert torch.equal(back.read(name), tensor), name
        assert back.tensors()[name].shape == tuple(tensor.shape)
    assert back.dtype == checkpoint.dtype
    assert any((codes(row.name).params["scale"] < 0).any() for row in plan.quantized) == ("sym" not in spec)


@pytest.mark.parametrize("spec", [W4, W4_ASYM, W8])
def test_rows_are_decoded_alone_as_among_all(model_factory, tmp_path, spec):
    source = model_factory("llama", "bfloat16")
    *_, folder = export(source, tmp_path / "out", everywhere(spec, roles=DENSE))
    back = opened(folder)
    name = "model.layers.0.mlp.up_proj.weight"
    for rows in (slice(0, 7), slice(5, 70), slice(120, 200)):
        some = back._compressed.decode(name, back._raw, rows)
        assert torch.equal(some, back.read(name)[rows])


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_reads_back_and_keeps_its_linears(model_factory, tmp_path, family):
    source = model_factory(family, "bfloat16")
    checkpoint, plan, codes, folder = export(source, tmp_path / "out", everywhere(W4))
    back = opened(folder)
    assert all(torch.equal(back.read(name), t) for name, t in meant(checkpoint, plan, codes).items())
    assert back.linears() == checkpoint.linears()
    stored = {name for name, info in back.tensors().items() if info.stored == "pack-quantized int4"}
    assert stored == {row.name for row in plan.quantized}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("spec", [W4, W8])
def test_transformers_computes_with_the_decoded_weights(model_factory, tmp_path, family, spec):
    source = model_factory(family, "float32")
    checkpoint, plan, codes, folder = export(source, tmp_path / "out", everywhere(spec))
    logits = loaded_logits(folder, checkpoint.dtype, TOKENS)
    torch.testing.assert_close(logits, expected_logits(checkpoint, plan, codes, TOKENS), atol=1e-5, rtol=1e-5)
    assert (logits - loaded_logits(source, checkpoint.dtype, TOKENS)).abs().max() > 1e-4


def mixed(linear):
    """8-bit products in the attention, 4-bit weights in the rest, the head in 3 bits."""
    wishes = {"attention": (W8, 8), "ffn": (W4, None), "head": (W3, None), "expert": (W4, None)}
    return wishes.get(linear.role.partition(".")[0], (None, None))


@pytest.mark.parametrize(
    ("family", "wish"),
    [
        ("llama", everywhere(W4_ASYM)),
        ("phi3", everywhere(W4_ASYM)),
        ("llama", everywhere(W3)),
        ("llama", everywhere(W8, 8)),
        ("phi3", everywhere(W8, 8)),
        ("llama", everywhere(W8, 8, (*DENSE, "head"))),
        ("llama", mixed),
        ("qwen3_moe", mixed),
        ("llama", lambda linear: (W4, None) if linear.block == 1 else (None, None)),
    ],
)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_transformers_follows_every_scheme(model_factory, tmp_path, family, wish, dtype):
    checkpoint, plan, codes, folder = export(model_factory(family, dtype), tmp_path / "out", wish)
    logits = loaded_logits(folder, checkpoint.dtype, TOKENS)
    torch.testing.assert_close(logits, expected_logits(checkpoint, plan, codes, TOKENS), atol=1e-5, rtol=1e-5)


def test_activations_are_read_back(llama, tmp_path):
    *_, folder = export(llama, tmp_path / "out", mixed)
    layers = [f"model.layers.{n}.self_attn.{p}_proj" for n in (0, 1) for p in "qkvo"]
    assert opened(folder).activations() == dict.fromkeys(sorted(layers), 8)


def test_the_config_says_what_the_folder_is(llama, tmp_path):
    checkpoint, *_, folder = export(llama, tmp_path / "out", mixed)
    config = json.loads((folder / "config.json").read_text())
    assert config["dtype"] == "bfloat16"
    assert config["architectures"] == ["LlamaForCausalLM"]
    quantization = config["quantization_config"]
    assert quantization["quant_method"] == "compressed-tensors"
    assert quantization["quantization_status"] == "compressed"
    assert quantization["format"] == "mixed-precision"
    assert [group["format"] for group in quantization["config_groups"].values()] == [
        "int-quantized",
        "pack-quantized",
        "pack-quantized",
    ]
    assert quantization["ignore"] == [r"re:.*\bembed_tokens$"]
    assert (folder / "tokenizer.json").read_bytes() == checkpoint.sidecars()["tokenizer.json"]


def test_nothing_quantized_is_the_model_itself(llama, tmp_path):
    wish = everywhere("float(dtype='bfloat16')")
    checkpoint, *_, folder = export(llama, tmp_path / "out", wish)
    assert "quantization_config" not in json.loads((folder / "config.json").read_text())
    assert all(torch.equal(opened(folder).read(name), checkpoint.read(name)) for name in checkpoint.tensors())


def test_a_quantized_folder_can_be_the_source(llama, tmp_path):
    *_, first = export(llama, tmp_path / "first", everywhere(W8))
    checkpoint, plan, codes, folder = export(first, tmp_path / "second", everywhere(W4, roles=("ffn",)))
    back = opened(folder)
    assert all(torch.equal(back.read(name), t) for name, t in meant(checkpoint, plan, codes).items())
    assert back.tensors()["model.layers.0.self_attn.q_proj.weight"].stored == "bfloat16"


def test_an_architecture_that_the_config_does_not_name_is_filled_in(llama):
    checkpoint = opened(llama)
    del checkpoint.config["architectures"]
    plan = plan_for(checkpoint, everywhere(W4), "bfloat16")
    assert model_config(checkpoint, plan)["architectures"] == ["LlamaForCausalLM"]


def test_equal_runs_write_equal_bytes(llama, tmp_path):
    folders = [export(llama, tmp_path / name, mixed, shard_bytes=50_000)[-1] for name in ("a", "b")]
    first, second = ({p.name: p.read_bytes() for p in sorted(f.iterdir())} for f in folders)
    assert first == second


def test_shards_stay_below_the_limit_and_the_index_finds_everything(llama, tmp_path):
    checkpoint, plan, codes, folder = export(llama, tmp_path / "out", everywhere(W4), shard_bytes=30_000)
    shards = sorted(folder.glob("*.safetensors"))
    assert [p.name for p in shards] == [
        f"model-{n:05d}-of-{len(shards):05d}.safetensors" for n in range(1, len(shards) + 1)
    ]
    assert len(shards) > 2
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    held = {}
    for shard in shards:
        assert stat.S_IMODE(shard.stat().st_mode) == 0o644
        with safe_open(shard, "pt") as file:
            sizes = {name: file.get_tensor(name).nbytes for name in file.keys()}  # noqa: SIM118
        held |= dict.fromkeys(sizes, shard.name)
        assert sum(sizes.values()) <= 30_000 or len(sizes) == 1
    assert index["weight_map"] == held
    assert index["metadata"]["total_size"] == opened(folder).total_bytes
    logits = loaded_logits(folder, checkpoint.dtype, TOKENS)
    torch.testing.assert_close(logits, expected_logits(checkpoint, plan, codes, TOKENS), atol=0, rtol=0)


LINEAR = Linear(name="w", rows=64, columns=576, role="ffn.up", block=0, input_group="g")
REASONS = [
    (W4, None, {}, None),
    (W4_ASYM, None, {}, None),
    (W8, 8, {}, None),
    (W8, 8, {"role": "head"}, None),
    ("int(bits=3, group=192)", None, {}, None),
    (
        "int(bits=4, group=128)",
        None,
        {},
        "rows of 576 do not divide into groups of 128; groups of 64, 32, 16 do",
    ),
    ("int(bits=4, group=16)", None, {"columns": 100}, 'rows of 100 do not .* 16; use group="channel"'),
    ("int(bits=4, group='tensor')", None, {}, 'use group="channel"'),
    ("int(bits=4, group=32, symmetric=False, zero='minimum')", None, {}, 'use zero="integer", not .minimum'),
    (W4_ASYM, None, {"rows": 500, "role": "head"}, "every 32 outputs, and 500 do not"),
    (
        "int(bits=4, group=32, scale='float32')",
        None,
        {},
        "in the model's dtype, bfloat16, not in float32",
    ),
    ("float(dtype='bfloat16')", None, {"role": "embedding", "tied": True}, None),
    ("float(dtype='float16')", None, {}, r"use float\(dtype='bfloat16'\)"),
    ("float(dtype='bfloat16')", 8, {}, "integer weights only"),
    (W8, None, {"role": "embedding"}, "quantized embeddings do not load.*on GPUs only$"),
    (W8, None, {"role": "embedding", "tied": True}, "never as the output head"),
    (W8, None, {"role": "router"}, "routers in full precision"),
    (W4, None, {"transposed": True}, "Conv1D"),
    (W4, None, {"role": "expert.gate_up", "experts": 4}, "experts are stored as one tensor"),
    (W4, None, {"role": "expert.up"}, None),
    (W4_ASYM, None, {"role": "expert.up"}, "without zero points"),
    (W8, 8, {"role": "expert.up"}, "activations are left alone"),
    (W4, 8, {}, "4-bit weights with 16-bit activations"),
    (W8, 4, {}, "to 8 bits, not to 4"),
    ("int(bits=8, group=64)", 8, {}, r"take int\(bits=8, group='channel'\)"),
    ("int(bits=8, group='channel', symmetric=False)", 8, {}, "one symmetric scale an output"),
]


@pytest.mark.parametrize(("spec", "activations", "changes", "reason"), REASONS)
def test_reasons(llama, spec, activations, changes, reason):
    exporter = CompressedTensors()
    exporter.check(opened(llama))
    answer = exporter.accepts(replace(LINEAR, **changes), build("format", spec), activations)
    assert (answer is None) if reason is None else re.search(reason, answer)


def refused(source, wish):
    checkpoint, exporter = opened(source), CompressedTensors()
    plan = plan_for(checkpoint, wish, exporter.scale_dtype(checkpoint))
    with pytest.raises(ExportError) as caught:
        exporter.check_plan(checkpoint, plan)
    return str(caught.value)


def test_matrices_that_are_computed_together_must_be_stored_alike(llama):
    message = refused(
        llama, lambda li: (W8 if li.role == "attention.q" else W4, None) if li.block == 0 else (None, None)
    )
    assert (
        "model.layers.0.self_attn.q_proj.weight as int(bits=8, group='channel', scale='bfloat16')" in message
    )
    assert "model.layers.0.self_attn.k_proj.weight as int(bits=4, group=32" in message
    assert "give them the same format" in message
    message = refused(
        llama, lambda li: (W8, 8 if li.role == "ffn.up" else None) if "ffn" in li.role else (None, None)
    )
    assert (
        "mlp.up_proj.weight as int(bits=8, group='channel', scale='bfloat16') with 8-bit activations"
        in message
    )
    message = refused(
        llama, lambda li: (W4, None) if li.role in ("attention.q", "attention.k") else (None, None)
    )
    assert "model.layers.0.self_attn.v_proj.weight as it is" in message


def test_all_experts_are_stored_alike(model_factory):
    mixtral = model_factory("mixtral", "bfloat16")
    message = refused(
        mixtral, lambda li: ((W4 if li.block else W8), None) if "expert" in li.role else (None, None)
    )
    assert "all experts with one scheme" in message
    assert "layers.0.block_sparse_moe.experts.0.w1.weight as int(bits=8" in message
    message = refused(mixtral, everywhere(W8, 8, ("attention",)))
    assert "only if the experts are too" in message


def test_zero_points_need_one_scheme(llama):
    message = refused(
        llama,
        lambda li: (W4_ASYM if "ffn" in li.role else W4, None) if li.block is not None else (None, None),
    )
    assert "asymmetric weights only if all layers are stored alike" in message


def test_a_plan_that_was_not_asked_for_is_refused_before_anything_is_written(llama, tmp_path):
    checkpoint = opened(llama)
    plan = plan_for(checkpoint, everywhere(W4, 8), "bfloat16")
    with pytest.raises(ExportError, match=r"q_proj.weight: cannot store int.*16-bit activations"):
        CompressedTensors().export(checkpoint, plan, codes_for(checkpoint, plan), tmp_path)
    assert not list(tmp_path.iterdir())


def matched(targets, modules):
    exact = {name for name in modules if name in targets}
    return exact | {name for name in modules for t in targets if t[:3] == "re:" and re.match(t[3:], name)}


def test_patterns_match_what_is_meant_and_nothing_else():
    modules = [f"model.layers.{n}.{part}" for n in range(12) for part in ("attn.q", "mlp.w1", "mlp.w2")]
    modules += [f"model.layers.{n}.moe.experts.{e}.w1" for n in range(12) for e in range(20)]
    modules += ["lm_head", "model.embed", "other.layers.1.attn.q", "project.0"]
    for wanted in (
        modules[:1],
        [name for name in modules if name.endswith("mlp.w1")],
        [name for name in modules if ".1." in name],
        [name for name in modules if "experts" in name],
        ["model.layers.3.moe.experts.7.w1", "lm_head"],
        ["model.layers.1.attn.q"],
        ["project.0"],
        modules,
    ):
        assert matched(patterns(wanted, modules), modules) == set(wanted)
    assert patterns([name for name in modules if "experts" in name], modules) == [
        r"re:.*\blayers\.\d+\.moe\.experts\.\d+\.w1$"
    ]


@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_targets_match_the_modules_of_transformers(model_factory, tmp_path, family):
    """By the library's own matching, over every module of the loaded model."""
    from compressed_tensors.utils.match import match_named_modules

    *_, plan, _, folder = export(model_factory(family, "bfloat16"), tmp_path / "out", everywhere(W4))
    back = opened(folder)
    groups = json.loads((folder / "config.json").read_text())["quantization_config"]["config_groups"]
    targets = [target for group in groups.values() for target in group["targets"]]
    found = {name for name, _ in match_named_modules(back.skeleton.model, targets)}
    linear = {name for name, module in back.skeleton.model.named_modules() if isinstance(module, nn.Linear)}
    assert found == {r.name.removesuffix(".weight") for r in plan.quantized if "expert" not in r.role}
    assert found == linear - {"lm_head"}
