"""A Llama-shaped checkpoint of random bf16 weights, written shard by shard."""

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import save_file

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "dtype": "bfloat16",
    "hidden_size": 3072,
    "intermediate_size": 8192,
    "num_attention_heads": 24,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 128256,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "hidden_act": "silu",
    "tie_word_embeddings": True,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
"""The shape of Llama 3.2 3B; 28 layers make 3.2 billion weights."""


def make_checkpoint(folder: Path, layers: int) -> Path:
    """Writes the checkpoint, one shard a layer; deterministic."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    config = {**CONFIG, "num_hidden_layers": layers}
    (folder / "config.json").write_text(json.dumps(config))
    _write_tokenizer(folder)
    generator = torch.Generator().manual_seed(0)
    shards = [{"model.embed_tokens.weight": (128256, 3072), "model.norm.weight": (3072,)}]
    shards += [_layer_shapes(number) for number in range(layers)]
    index = {}
    for number, shapes in enumerate(shards, 1):
        name = f"model-{number:05}-of-{len(shards):05}.safetensors"
        save_file({key: _random(shape, generator) for key, shape in shapes.items()}, folder / name)
        index.update(dict.fromkeys(shapes, name))
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    return folder


def _layer_shapes(number: int) -> dict[str, tuple[int, ...]]:
    at = f"model.layers.{number}."
    hidden, inner, key = 3072, 8192, 1024
    return {
        at + "self_attn.q_proj.weight": (hidden, hidden),
        at + "self_attn.k_proj.weight": (key, hidden),
        at + "self_attn.v_proj.weight": (key, hidden),
        at + "self_attn.o_proj.weight": (hidden, hidden),
        at + "mlp.gate_proj.weight": (inner, hidden),
        at + "mlp.up_proj.weight": (inner, hidden),
        at + "mlp.down_proj.weight": (hidden, inner),
        at + "input_layernorm.weight": (hidden,),
        at + "post_attention_layernorm.weight": (hidden,),
    }


def _random(shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    return torch.empty(shape, dtype=torch.bfloat16).normal_(0, 0.02, generator=generator)


def _write_tokenizer(folder: Path) -> None:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: number for number, token in enumerate(["<pad>", "<s>", "</s>", *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    )
    wrapped.save_pretrained(folder)
