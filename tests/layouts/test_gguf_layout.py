"""Blocks against the gguf package's own decoder, rearrangements against their inverses."""

import gguf
import numpy as np
import pytest
import torch

from gguf_tools import cut
from poise.core.errors import ExportError, FormatError
from poise.core.format import QTensor
from poise.core.registry import build
from poise.layouts.gguf import Slot, rope_order, slots
from poise.layouts.gguf_blocks import INTEGERS, block_of, pack
from poise.layouts.gguf_pretokenizer import ALIASES, NAMES, pre_name, pre_tokenizer
from poise.layouts.gguf_rope import llama3_divisors

SPECS = {
    "Q4_0": "int(bits=4, group=32)",
    "Q5_0": "int(bits=5, group=32)",
    "Q8_0": "int(bits=8, group=32, scale='float16')",
    "Q4_1": "int(bits=4, group=32, symmetric=False, zero='minimum')",
    "Q5_1": "int(bits=5, group=32, symmetric=False, zero='minimum')",
}


def random_codes(format, rows=6, groups=5, generator=None):
    """Every code, and scales of any sign and size that float16 has."""
    generator = generator or torch.Generator().manual_seed(0)
    low = -(2 ** (format.bits - 1)) if format.symmetric else 0
    shape = (rows, 32 * groups)
    codes = torch.randint(low, low + 2**format.bits, shape, generator=generator)
    bits = torch.randint(-(2**15), 2**15, (2, rows, groups), generator=generator).to(torch.int16)
    scale, minimum = bits.view(torch.float16).nan_to_num(1.0, 65504.0, -65504.0)
    params = {"scale": scale} if format.symmetric else {"scale": scale, "minimum": minimum}
    codes = codes.to(torch.int8 if format.symmetric else torch.uint8)
    return QTensor(codes=codes, params=params, format=format)


@pytest.mark.parametrize("block", SPECS)
@pytest.mark.parametrize("seed", range(5))
def test_blocks_decode_to_the_very_floats_of_the_format(block, seed):
    format = build("format", SPECS[block]).resolve("float16")
    qtensor = random_codes(format, generator=torch.Generator().manual_seed(seed))
    decoded = gguf.dequantize(pack(qtensor), gguf.GGMLQuantizationType[block])
    assert block_of(format) == block
    expected = qtensor.decode()
    assert torch.equal(torch.from_numpy(decoded).view(torch.int32), expected.view(torch.int32))


def test_one_q5_1_block_written_out_by_hand():
    """Codes 0..31: weight j of the first half shares a byte with weight j + 16, bit 4 goes to the mask."""
    format = build("format", SPECS["Q5_1"]).resolve("float16")
    params = {"scale": torch.tensor([[0.5]]).half(), "minimum": torch.tensor([[-2.0]]).half()}
    qtensor = QTensor(codes=torch.arange(32, dtype=torch.uint8)[None], params=params, format=format)
    expected = [0x00, 0x38, 0x00, 0xC0, 0x00, 0x00, 0xFF, 0xFF, *(0x11 * j for j in range(16))]
    assert pack(qtensor).tolist() == [expected]


@pytest.mark.parametrize(("dtype", "block"), [("float32", "F32"), ("float16", "F16"), ("bfloat16", "BF16")])
def test_floats_are_stored_as_they_are(dtype, block):
    format = build("format", f"float(dtype={dtype!r})")
    values = torch.randn(4, 33).to(getattr(torch, dtype))
    packed = pack(QTensor(codes=values, params={}, format=format))
    assert block_of(format) == block
    assert packed.shape == (4, 33 * values.itemsize)
    decoded = gguf.dequantize(packed, gguf.GGMLQuantizationType[block])
    assert torch.equal(torch.from_numpy(decoded), values.float())


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group", [16, 32, 64, "'channel'", "'tensor'"])
@pytest.mark.parametrize("zero", ["integer", "minimum"])
def test_every_other_integer_format_has_no_block(bits, symmetric, group, zero):
    if symmetric and zero == "minimum":
        return
    format = build("format", f"int(bits={bits}, group={group}, symmetric={symmetric}, zero={zero!r})")
    fits = group == 32 and (symmetric or zero == "minimum") and (bits, symmetric) in INTEGERS
    assert (block_of(format) is not None) == fits


@pytest.mark.parametrize("scale", ["bfloat16", "float32"])
def test_blocks_hold_float16_scales_only(scale):
    format = build("format", f"int(bits=4, group=32, scale={scale!r})")
    assert block_of(format) is None
    with pytest.raises(FormatError, match="no block for int"):
        pack(random_codes(format))


def test_scales_of_another_dtype_are_refused():
    format = build("format", SPECS["Q4_0"])
    qtensor = random_codes(format)
    wrong = QTensor(codes=qtensor.codes, params={"scale": qtensor.params["scale"].float()}, format=format)
    with pytest.raises(FormatError, match=r"Q4_0 blocks hold float16 scales, got torch.float32"):
        pack(wrong)


def test_rope_order_of_two_heads_of_four():
    assert rope_order(8, 2).tolist() == [0, 2, 1, 3, 4, 6, 5, 7]


@pytest.mark.parametrize(
    "change", [{"heads": 2}, {"transposed": True}, {"shift": 1.0}, {"heads": 4, "shift": 0.0}, {}]
)
def test_rearranging_is_undone(change):
    slot = Slot(name="x", sources=("y",), shape=(16, 6), **change)
    source = torch.randint(-8, 8, (6, 16) if slot.transposed else (16, 6)).float()
    there = slot.to_gguf(source)
    assert tuple(there.shape) == slot.shape
    assert torch.equal(slot.from_gguf(there), source)


def test_moving_packed_rows_is_moving_the_rows_of_the_decoded_weight():
    qtensor = random_codes(build("format", SPECS["Q5_1"]).resolve("float16"), rows=16)
    order = rope_order(16, 2)
    moved = gguf.dequantize(pack(qtensor)[order.numpy()], gguf.GGMLQuantizationType.Q5_1)
    assert np.array_equal(moved, qtensor.decode()[order].numpy())


LLAMA = {
    "model_type": "llama",
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
}


def test_a_tensor_without_a_place_is_an_error():
    with pytest.raises(ExportError, match=r"score.weight has no place in llama.cpp's architecture 'llama'"):
        slots(LLAMA, {"score.weight": (2, 8)})


def test_constants_of_old_checkpoints_are_passed_over():
    found = slots(LLAMA, {"model.norm.weight": (8,), "model.layers.0.self_attn.rotary_emb.inv_freq": (2,)})
    assert [slot.name for slot in found] == ["output_norm.weight"]


def test_two_tensors_for_one_place_are_an_error():
    with pytest.raises(ExportError, match="would both become output_norm"):
        slots(LLAMA, {"model.norm.weight": (8,), "norm.weight": (8,)})


def test_a_missing_expert_is_an_error():
    config = {**LLAMA, "model_type": "mixtral", "num_local_experts": 3}
    names = [f"model.layers.0.block_sparse_moe.experts.{number}.w1.weight" for number in (0, 2)]
    with pytest.raises(ExportError, match=r"ffn_gate_exps.* stacks 3 experts"):
        slots(config, dict.fromkeys(names, (4, 8)))


def test_rows_that_do_not_split_into_heads_are_an_error():
    with pytest.raises(ExportError, match="6 rows do not split into pairs of 2 heads"):
        slots(LLAMA, {"model.layers.0.self_attn.q_proj.weight": (6, 8)})


def test_llama3_divisors_are_those_of_transformers():
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    rope = {
        "rope_type": "llama3",
        "factor": 32.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
        "rope_theta": 500000.0,
    }
    config = LlamaConfig(head_dim=128, max_position_embeddings=131072, rope_parameters=rope)
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, "cpu")
    plain = 500000.0 ** -(torch.arange(0, 128, 2) / 128)
    assert torch.allclose(plain / llama3_divisors(128, rope), scaled, rtol=1e-5)


@pytest.mark.parametrize(("key", "name"), NAMES.items(), ids=NAMES.values())
def test_a_pre_tokenizer_is_found_again_by_the_name_it_gets(key, name):
    import json

    from tokenizers import Tokenizer, models

    made, ignore_merges = pre_tokenizer(name)
    backend = Tokenizer(models.BPE(ignore_merges=ignore_merges))
    backend.pre_tokenizer = made
    assert pre_name(json.loads(backend.to_str())) == name


def test_removing_what_is_between_matches_is_isolating_the_matches():
    import json

    from tokenizers import Regex, Tokenizer, models, pre_tokenizers

    from poise.layouts.gguf_pretokenizer import QWEN2

    backend = Tokenizer(models.BPE())
    split = pre_tokenizers.Split(Regex(QWEN2), behavior="removed", invert=True)
    backend.pre_tokenizer = pre_tokenizers.Sequence([split, cut("bytes")])
    assert pre_name(json.loads(backend.to_str())) == "qwen2"


def test_every_other_name_stands_for_one_in_the_table():
    others = [other for names in ALIASES.values() for other in names]
    assert set(ALIASES) <= set(NAMES.values())
    assert len(set(others)) == len(others)
    assert not set(others) & set(NAMES.values())
    assert all(pre_tokenizer(other) is not None for other in others)
    assert pre_tokenizer("somebody-elses") is None
