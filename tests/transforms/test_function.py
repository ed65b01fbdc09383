"""Every transform leaves the function as it is, in float64, on many architectures; where it cannot, it says why."""

import pytest
import torch
from torch.overrides import TorchFunctionMode

from poise.checkpoints import open_checkpoint
from poise.checkpoints.linears import Skeleton
from poise.checkpoints.rewritten import Rewritten, as_tensors, from_tensors
from poise.checkpoints.topology import find_topology
from poise.core.registry import build
from poise.core.transform import Material, Rewrite
from poise.pipeline.blocks import fill

TOKENS = torch.randint(3, 300, (2, 24), generator=torch.Generator().manual_seed(0))


class Float64(TorchFunctionMode):
    """Norms of transformers compute in float32 whatever they are given; here they do not."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func in (torch.Tensor.to, torch.Tensor.float) and args[0].dtype == torch.float64:
            return args[0]
        return func(*args, **(kwargs or {}))


def logits(checkpoint):
    """Of the model in float64."""
    from transformers import AutoModelForCausalLM

    skeleton = Skeleton(checkpoint.config)
    skeleton.config._experts_implementation = "eager"
    model = AutoModelForCausalLM.from_config(skeleton.config).double().eval()
    with torch.no_grad():
        for name in checkpoint.tensors():
            fill(model, skeleton, name, checkpoint.read(name).double(), torch.float64)
        model.tie_weights()
        with Float64():
            return model(input_ids=TOKENS, use_cache=False).logits


def rewritten(checkpoint, *specs, stats=None):
    """A checkpoint through transforms, one after the other."""
    for spec in specs:
        transform = build("transform", spec)
        topology = find_topology(checkpoint)
        assert transform.refuses(topology) is None
        matrices = {linear.name: linear for linear in checkpoint.linears()}

        def read(name, checkpoint=checkpoint, matrices=matrices):
            return checkpoint.read_matrix(matrices[name]) if name in matrices else checkpoint.read(name)

        formats = {name: build("format", "int(bits=3, group=16)").resolve("float16") for name in matrices}
        material = Material(topology=topology, read=read, formats=formats, stats=stats or {})
        rewrites = transform.rewrites(material)
        assert rewrites or transform.unties
        checkpoint = Rewritten(checkpoint, rewrites, untied=transform.unties, precision=torch.float64)
    return checkpoint


def assert_same(before, after):
    assert float((before - after).abs().max()) < 1e-9 * float(before.abs().max())


@pytest.mark.parametrize(
    "name",
    ["llama", "llama-tied", "mistral", "qwen2", "qwen3", "gemma3_text", "phi3", "mixtral", "qwen3_moe"],
)
def test_folding_norms(model_factory, name):
    checkpoint = open_checkpoint(model_factory(name))
    after = rewritten(checkpoint, "fold")
    topology = find_topology(checkpoint)
    folded = [norm for norm in topology.norms if topology.embedding not in norm.readers]
    assert len(folded) >= 4
    for norm in folded:
        assert (after.read(norm.weight) == norm.unit).all()
        assert (checkpoint.read(norm.weight) != norm.unit).any()
    assert_same(logits(checkpoint), logits(after))


@pytest.mark.parametrize("kind", ["hadamard", "random"])
@pytest.mark.parametrize("name", ["llama", "mistral", "qwen2", "qwen3", "mixtral", "qwen3_moe"])
def test_rotating_stream_and_values(model_factory, name, kind):
    checkpoint = open_checkpoint(model_factory(name))
    after = rewritten(checkpoint, f"rotate(kind={kind!r})")
    for name in find_topology(checkpoint).writers:
        assert not torch.allclose(checkpoint.read(name).double(), after.read(name), atol=0.01)
    assert_same(logits(checkpoint), logits(after))


def test_rotating_what_has_fused_projections_leaves_values(model_factory):
    checkpoint = open_checkpoint(model_factory("phi3"))
    assert "values" in build("transform", "rotate").refuses(find_topology(checkpoint))
    assert_same(logits(checkpoint), logits(rewritten(checkpoint, "rotate(values=False)")))


@pytest.mark.parametrize("name", ["gemma3_text", "opt"])
def test_values_alone_where_the_stream_cannot_be_rotated(model_factory, name):
    checkpoint = open_checkpoint(model_factory(name))
    assert "stream" in build("transform", "rotate").refuses(find_topology(checkpoint))
    assert_same(logits(checkpoint), logits(rewritten(checkpoint, "rotate(stream=False)")))


def test_a_tied_model_must_be_untied_before_its_stream_is_rotated(model_factory):
    checkpoint = open_checkpoint(model_factory("llama-tied"))
    assert "untie" in build("transform", "rotate").refuses(find_topology(checkpoint))
    after = rewritten(checkpoint, "untie", "fold", "rotate", "rotate(kind='random', seed=5)")
    assert not after.config["tie_word_embeddings"]
    assert "lm_head.weight" in after.tensors()
    assert {linear.role for linear in after.linears()} > {"embedding", "head"}
    assert_same(logits(checkpoint), logits(after))
    assert "already" in build("transform", "untie").refuses(find_topology(after))


def test_an_activation_of_the_same_matrix_is_no_product(model_factory):
    """GPT-2 multiplies the output of its first matrix by a function of itself: no pair."""
    topology = find_topology(open_checkpoint(model_factory("gpt2")))
    assert topology.pairs == ()
    assert topology.mixed is not None


def test_rows_of_a_rewritten_matrix_and_the_fingerprint(model_factory):
    checkpoint = open_checkpoint(model_factory("llama"))
    after = rewritten(checkpoint, "rotate")
    for linear in after.linears():
        whole = after.read_matrix(linear)
        assert torch.equal(after.read_rows(linear, slice(3, 17)), whole[3:17])
    assert after.fingerprint() not in (
        checkpoint.fingerprint(),
        rewritten(checkpoint, "rotate(seed=1)").fingerprint(),
    )
    assert after.fingerprint() == rewritten(checkpoint, "rotate").fingerprint()


def test_rewrites_go_through_a_file_in_their_order():
    dice = torch.Generator().manual_seed(0)
    made = [
        Rewrite(name=f"layers.{k} w", kind=kind, value=torch.randn(4, 4, dtype=torch.float64, generator=dice))
        for k, kind in enumerate(("left", "right", "set") * 5)
    ]
    made += [Rewrite(name="again", kind="rows", value=made[3].value)]
    stored = as_tensors(made)
    assert len(stored) == len(made)  # one value is there once, and a list of all
    again = from_tensors(stored)
    assert [(item.name, item.kind) for item in again] == [(item.name, item.kind) for item in made]
    assert all(torch.equal(one.value, other.value) for one, other in zip(again, made, strict=True))
    with pytest.raises(ValueError, match="turn"):
        Rewrite(name="w", kind="turn", value=torch.ones(1))
