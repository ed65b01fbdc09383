"""llama.cpp against transformers on the same random weights."""

import builtins
import ctypes
import sys
from types import SimpleNamespace

import pytest
import torch

from poise.core.errors import EngineError, MissingExtra, UsageError
from poise.core.registry import build

pytest.importorskip("xllamacpp")
gguf = pytest.importorskip("gguf")

from poise.engines import llamacpp
from poise.engines.llamacpp import LlamaCpp

HEADS, KV_HEADS, LAYERS, HIDDEN, FFN = 4, 2, 2, 64, 128
MERGES = ["t h", "th e", "Ġ c", "a t", "Ġc at"]


def vocabulary():
    """The 256 bytes as GPT-2 writes them, merges, and two control tokens."""
    from tokenizers.pre_tokenizers import ByteLevel

    return [*sorted(ByteLevel.alphabet()), *(merge.replace(" ", "") for merge in MERGES), "<s>", "</s>"]


VOCABULARY = 256 + len(MERGES) + 2


def reference_model():
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=HIDDEN,
        intermediate_size=FFN,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        vocab_size=VOCABULARY,
        max_position_embeddings=4096,
        initializer_range=0.2,
        attn_implementation="eager",
    )
    model = LlamaForCausalLM(config).float().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def rotate_neighbours(weight, heads):
    """Rows of q or k in llama.cpp's order: it rotates rows 2i and 2i+1 of a head, transformers i and i+d/2."""
    rows, columns = weight.shape
    return weight.view(heads, 2, rows // heads // 2, columns).transpose(1, 2).reshape(rows, columns)


def write_gguf(path, model):
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(4096)
    writer.add_embedding_length(HIDDEN)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(FFN)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_layer_norm_rms_eps(model.config.rms_norm_eps)
    writer.add_rope_dimension_count(HIDDEN // HEADS)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(VOCABULARY)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(vocabulary())
    writer.add_token_types([gguf.TokenType.NORMAL] * (VOCABULARY - 2) + [gguf.TokenType.CONTROL] * 2)
    writer.add_token_merges(MERGES)
    writer.add_bos_token_id(VOCABULARY - 2)
    writer.add_eos_token_id(VOCABULARY - 1)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, LAYERS)
    for name, weight in model.state_dict().items():
        if "q_proj" in name or "k_proj" in name:
            weight = rotate_neighbours(weight, HEADS if "q_proj" in name else KV_HEADS)
        stem, _, ending = name.rpartition(".")
        writer.add_tensor(f"{names.get_name(stem)}.{ending}", weight.contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def checkpoint(path):
    return SimpleNamespace(path=path)
