"""Linears are found by structure: roles, blocks and input groups of nine architectures."""

from collections import Counter

import pytest
from safetensors.torch import save_file

from poise.checkpoints import open_checkpoint
from poise.core.errors import CheckpointError

SEPARATE = {"attention.q": 2, "attention.k": 2, "attention.v": 2, "attention.o": 2}
GATED = {"ffn.gate": 2, "ffn.up": 2, "ffn.down": 2}
EXPERTS = {"expert.gate": 8, "expert.up": 8, "expert.down": 8, "router": 2}
EXPECTED = {
    "llama": {"embedding": 1, **SEPARATE, **GATED, "head": 1},
    "llama-tied": {"embedding": 1, **SEPARATE, **GATED},
    "mistral": {"embedding": 1, **SEPARATE, **GATED, "head": 1},
    "qwen3": {"embedding": 1, **SEPARATE, **GATED, "head": 1},
    "gemma3_text": {"embedding": 1, **SEPARATE, **GATED},
    "phi3": {
        "embedding": 1,
        "attention.qkv": 2,
        "attention.o": 2,
        "ffn.gate_up": 2,
        "ffn.down": 2,
        "head": 1,
    },
    "gpt2": {"embedding": 1, "attention.qkv": 2, "attention.o": 2, "ffn.up": 2, "ffn.down": 2},
    "opt": {"embedding": 1, **SEPARATE, "ffn.up": 2, "ffn.down": 2},
    "mixtral": {"embedding": 1, **SEPARATE, **EXPERTS, "head": 1},
    "qwen3_moe": {"embedding": 1, **SEPARATE, **EXPERTS, "head": 1},
}


def linears_of(folder):
    return {linear.name: linear for linear in open_checkpoint(folder).linears()}


@pytest.mark.parametrize("name", EXPECTED)
def test_every_matrix_has_its_role(model_factory, name):
    linears = linears_of(model_factory(name))
    assert Counter(linear.role for linear in linears.values()) == EXPECTED[name]
    assert {linear.block for linear in linears.values()} == {None, 0, 1}
    assert all(
        linear.tied == ("head" not in EXPECTED[name])
        for linear in linears.values()
        if linear.role == "embedding"
    )


@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma3_text", "opt", "mixtral"])
def test_queries_keys_and_values_read_one_activation(model_factory, name):
    by_group = {}
    for linear in linears_of(model_factory(name)).values():
        if linear.block == 1:
            by_group.setdefault(linear.input_group, set()).add(linear.role)
    assert {"attention.q", "attention.k", "attention.v"} in by_group.values()
    assert {"attention.o"} in by_group.values()


@pytest.mark.parametrize("name", ["llama", "gemma3_text"])
def test_gate_and_up_read_one_activation_and_down_another(model_factory, name):
    linears = [linear for linear in linears_of(model_factory(name)).values() if linear.block == 0]
    group = {linear.role: linear.input_group for linear in linears}
    assert group["ffn.gate"] == group["ffn.up"] != group["ffn.down"]


def test_transposed_storage_is_undone(model_factory):
    checkpoint = open_checkpoint(model_factory("gpt2"))
    linear = next(linear for linear in checkpoint.linears() if linear.role == "attention.qkv")
    assert linear.transposed
    assert linear.shape == (192, 64)
    assert checkpoint.read_matrix(linear).shape == (192, 64)
    assert checkpoint.read(linear.name).shape == (64, 192)


def test_experts_stored_as_one_stack(model_factory, copy_of):
    from transformers import AutoModelForCausalLM

    folder = copy_of(model_factory("qwen3_moe"))
    model = AutoModelForCausalLM.from_pretrained(folder)
    save_file(
        {name: value.contiguous() for name, value in model.state_dict().items()}, folder / "model.safetensors"
    )
    linears = linears_of(folder)
    stacked = linears["model.layers.0.mlp.experts.gate_up_proj"]
    assert (stacked.role, stacked.experts, stacked.shape) == ("expert.gate_up", 4, (4 * 64, 64))
    assert linears["model.layers.1.mlp.experts.down_proj"].role == "expert.down"
    matrix = open_checkpoint(folder).read_matrix(stacked)
    assert matrix.equal(model.model.layers[0].mlp.experts.gate_up_proj.reshape(256, 64))


def test_a_shape_that_contradicts_the_configuration_is_refused(model_factory, copy_of):
    from conftest import edit_json

    folder = copy_of(model_factory("llama"))
    edit_json(folder / "config.json", intermediate_size=96)
    with pytest.raises(CheckpointError, match=r"mlp.*asks for \[64, 96\]"):
        open_checkpoint(folder).linears()


def test_an_unknown_architecture_is_named(model_factory, copy_of):
    from conftest import edit_json

    folder = copy_of(model_factory("llama"))
    edit_json(folder / "config.json", model_type="perceptron9000")
    with pytest.raises(CheckpointError, match="unknown architecture 'perceptron9000'"):
        open_checkpoint(folder).linears()
