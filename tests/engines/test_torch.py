"""The torch engine computes what transformers computes with the same weights."""

import math

import pytest
import torch

from poise.checkpoints import open_checkpoint
from poise.checkpoints.huggingface import HuggingFaceCheckpoint
from poise.core.errors import EngineError
from poise.core.registry import build
from poise.engines.torch import Torch

ARCHITECTURES = ("llama", "llama-tied", "qwen3", "gemma3_text", "gpt2", "opt", "mixtral", "qwen3_moe")
TOKENS = [1, 17, 300, 5, 5, 42, 199, 8, 64, 2, 3]


def loaded(checkpoint, **arguments):
    engine = Torch(**arguments)
    engine.load(checkpoint)
    return engine


def theirs(folder):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_scores_are_those_of_transformers(model_factory, name):
    folder = model_factory(name)
    with loaded(open_checkpoint(folder)) as engine, torch.no_grad():
        got = engine.logits(TOKENS)
        expected = theirs(folder)(input_ids=torch.tensor([TOKENS])).logits[0]
    assert got.dtype == torch.float32
    assert got.shape == (len(TOKENS), 320)
    assert torch.allclose(got, expected, atol=1e-5, rtol=1e-5)
    assert float(got.std()) > 1e-3, "nothing was computed"


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_generation_is_the_chain_of_most_likely_tokens(model_factory, name):
    """With the cache as without it: positions go on where the prompt ended."""
    with loaded(open_checkpoint(model_factory(name))) as engine:
        made = engine.generate(TOKENS, 8)
        chain = list(TOKENS)
        for _ in range(8):
            chain.append(int(engine.logits(chain)[-1].argmax()))
    assert made.tokens == chain[len(TOKENS) :]
    assert len(made.seconds) == 8
    assert made.seconds == sorted(made.seconds)
    assert made.seconds[0] > 0


@pytest.mark.parametrize("name", ["llama", "gemma3_text", "gpt2", "opt"])
def test_several_texts_at_once_go_on_as_each_alone(model_factory, name):
    prompts = [TOKENS, TOKENS[::-1], [7] * len(TOKENS)]
    with loaded(open_checkpoint(model_factory(name))) as engine:
        alone = [engine.generate(tokens, 6).tokens for tokens in prompts]
        assert engine.generate_many(prompts, 6) == alone


def test_an_end_token_does_not_stop_it(model_factory, copy_of):
    from safetensors.torch import load_file, save_file

    folder = copy_of(model_factory("llama"))
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"].zero_()
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with loaded(open_checkpoint(folder)) as engine:
        engine.model.config.eos_token_id = 0  # all scores are equal, so token 0 is chosen
        assert engine.generate(TOKENS, 5).tokens == [0] * 5


def test_earlier_calls_leave_no_trace(model_factory):
    with loaded(open_checkpoint(model_factory("llama"))) as engine:
        before = engine.logits(TOKENS)
        engine.generate(TOKENS[::-1], 4)
        engine.logits(TOKENS[:3])
        assert torch.equal(engine.logits(TOKENS), before)
        assert torch.allclose(engine.logits(TOKENS[:4]), before[:4], atol=1e-6)


def test_weights_of_any_dtype_are_computed_in_the_asked_one(llama):
    with loaded(open_checkpoint(llama)) as engine:
        assert {p.dtype for p in engine.model.parameters()} == {torch.float32}
        exact = engine.logits(TOKENS)
    with loaded(open_checkpoint(llama), dtype="bfloat16") as engine:
        assert {p.dtype for p in engine.model.parameters()} == {torch.bfloat16}
        rough = engine.logits(TOKENS)
    assert rough.dtype == torch.float32
    assert 0 < float((rough - exact).abs().max()) < 0.1 * float(exact.abs().max())


@pytest.mark.parametrize("exporter", ["gguf", "compressed-tensors"])
def test_quantized_models_run_with_their_decoded_weights(llama, tmp_path, exporter):
    import poise

    (artifact,) = poise.quantize(llama, "edge", tmp_path / "out", to=exporter)
    checkpoint, model = open_checkpoint(artifact.model), theirs(llama)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(checkpoint.read(name))
        expected = model(input_ids=torch.tensor([TOKENS])).logits[0]
    with loaded(checkpoint) as engine:
        assert torch.allclose(engine.logits(TOKENS), expected, atol=1e-5)


class Rounding(HuggingFaceCheckpoint):
    """A model whose engine rounds the inputs of one module."""

    bits = 4

    def activations(self):
        return {"model.layers.1.mlp.down_proj": self.bits}


@pytest.mark.parametrize("bits", [4, 8])
def test_activations_are_rounded_as_integer_engines_do(model_factory, bits):
    """By the code of compressed-tensors, whose configuration asks for it."""
    from compressed_tensors.quantization import QuantizationArgs
    from compressed_tensors.quantization.lifecycle.forward import fake_quantize
    from compressed_tensors.quantization.utils import compute_dynamic_scales_and_zp

    folder = model_factory("llama")
    checkpoint = Rounding(folder, str(folder))
    checkpoint.bits = bits
    model = theirs(folder)
    down = model.model.layers[1].mlp.down_proj

    arguments = QuantizationArgs(num_bits=bits, symmetric=True, strategy="token", dynamic=True)

    def rounded(x):
        scale, zero = compute_dynamic_scales_and_zp(x, arguments, down)
        return fake_quantize(x, scale, zero, arguments)

    with torch.no_grad():
        plain = model(input_ids=torch.tensor([TOKENS])).logits[0]
        down.register_forward_pre_hook(lambda _, args: (rounded(args[0]),))
        expected = model(input_ids=torch.tensor([TOKENS])).logits[0]
    with loaded(checkpoint) as engine:
        got = engine.logits(TOKENS)
    moved = float((expected - plain).abs().max())
    assert moved > 0
    assert float((got - expected).abs().max()) < 0.02 * moved


def test_rounding_zeros_gives_zeros():
    from poise.engines.torch import _round_inputs

    (rounded, other) = _round_inputs(8)(torch.nn.Identity(), (torch.zeros(1, 2, 4), "other"))
    assert torch.equal(rounded, torch.zeros(1, 2, 4))
    assert other == "other"


def test_a_missing_weight_is_named(model_factory):
    class Lacking(HuggingFaceCheckpoint):
        def tensors(self):
            return {
                name: info
                for name, info in super().tensors().items()
                if name != "model.layers.0.mlp.up_proj.weight"
            }

    folder = model_factory("llama")
    with pytest.raises(EngineError, match=r"lacks .*model\.layers\.0\.mlp\.up_proj"):
        loaded(Lacking(folder, str(folder)))


def test_a_missing_head_is_missing_unless_it_is_tied(model_factory):
    class Headless(HuggingFaceCheckpoint):
        def tensors(self):
            return {name: info for name, info in super().tensors().items() if name != "lm_head.weight"}

    tied = model_factory("llama-tied")
    loaded(Headless(tied, str(tied)))
    untied = model_factory("llama")
    with pytest.raises(EngineError, match=r"lacks .*lm_head\.weight"):
        loaded(Headless(untied, str(untied)))


def test_it_is_found_by_name_and_closing_twice_is_harmless(llama):
    engine = build("engine", "torch(dtype='bfloat16')")
    engine.load(open_checkpoint(llama))
    assert not math.isnan(float(engine.logits([1, 2]).sum()))
    engine.close()
    engine.close()
    with pytest.raises(EngineError, match="computes in float32, bfloat16, float16, not in int8"):
        Torch(dtype="int8")
