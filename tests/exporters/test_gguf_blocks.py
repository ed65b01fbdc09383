"""Every stock block in a real file: exported, read back bit for bit, and run by llama.cpp."""

import pytest
import torch

import poise
from conftest import build_model
from poise.checkpoints import open_checkpoint
from poise.core.plan import Option, Recipe, Rule
from poise.core.registry import build
from poise.layouts.gguf_blocks import STOCK, block_of
from poise.layouts.gguf_header import read_header

SPECS = (*STOCK, "mxfp4", "nvfp4(tensor_scale=False)")
TOKENS = [1, *range(20, 60)]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """Widths that every block divides."""
    return build_model(
        tmp_path_factory.mktemp("model"),
        "llama",
        "float32",
        hidden_size=256,
        intermediate_size=512,
        head_dim=64,
    )


def recipe(spec):
    """The same format everywhere: llama.cpp takes rows out of the embedding by other code than it multiplies with."""
    rules = (Rule(role="*", options=(Option(format=spec),), solver="search"),)
    return Recipe(name="blocks", description="", rules=rules)


def logits(engine, checkpoint):
    with build("engine", engine) as loaded:
        loaded.load(checkpoint)
        return loaded.logits(TOKENS)


@pytest.mark.parametrize("spec", SPECS)
def test_llama_cpp_computes_with_the_weights_that_were_meant(spec, model, tmp_path):
    pytest.importorskip("xllamacpp")
    (artifact,) = poise.quantize(model, recipe(spec), tmp_path / "out")  # reads every tensor back
    block = block_of(build("format", spec))
    types = {name: entry.type for name, entry in read_header(artifact.model).tensors.items()}
    assert {types[f"blk.0.{name}.weight"] for name in ("attn_q", "ffn_down", "ffn_up")} == {block}
    assert types["output.weight"] == types["token_embd.weight"] == block
    checkpoint = open_checkpoint(artifact.model)
    expected, found = logits("torch", checkpoint), logits("llamacpp", checkpoint)
    # llama.cpp rounds activations to 8 bits on top; a block that it read otherwise would be off by more than half.
    assert float((expected - found).norm() / expected.norm()) < 0.08


@pytest.mark.parametrize("spec", ["q4_k", "iq2_xxs", "q8_0"])
def test_widths_that_a_block_does_not_divide_are_kept_with_the_reason(spec, llama, tmp_path):
    (artifact,) = poise.quantize(llama, recipe(spec), tmp_path / "out")
    rows = [row for row in artifact.plan.rows if row.role.startswith("ffn")]
    if spec == "q8_0":
        assert all(row.format == "q8_0" for row in rows)
    else:
        assert all(row.kept and "not a multiple of the block of 256" in row.reason for row in rows)


def test_integers_and_the_block_of_the_same_meaning_give_the_same_bytes(model, tmp_path):
    specs = {
        "q4_0": "int(bits=4, group=32)",
        "q5_1": "int(bits=5, group=32, symmetric=False, zero='minimum')",
    }
    for block, spec in specs.items():
        weight = torch.randn(4, 64, generator=torch.Generator().manual_seed(0))
        from poise.layouts.gguf_blocks import pack

        format = build("format", spec).resolve("float16")
        quantized = build("solver", "rtn").solve(weight, format)
        decoded = build("format", block).unpack({"blocks": torch.from_numpy(pack(quantized))}, 64)
        assert torch.equal(build("format", block).decode(*decoded), quantized.decode())
