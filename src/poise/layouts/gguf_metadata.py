"""A model's configuration as GGUF hyper-parameters, and back.

llama.cpp hard-codes what transformers reads from ``config.json``: the activation function, where norms
sit, which layers attend to a window. A configuration that asks for anything else than the code does is
refused, because llama.cpp would load it and answer something different.
"""

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from poise.core.errors import CheckpointError, ExportError
from poise.layouts.gguf import ARCHITECTURES, architecture
from poise.layouts.gguf_header import Header, Value, f32, u32
from poise.layouts.gguf_rope import read_rope, rope_keys

Config = Mapping[str, Any]

GENERAL = {
    "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size",
    "block_count": "num_hidden_layers",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "vocab_size": "vocab_size",
    "expert_count": "num_local_experts",
    "expert_used_count": "num_experts_per_tok",
    "expert_feed_forward_length": "moe_intermediate_size",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
}
GPT2 = {
    "context_length": "n_positions",
    "embedding_length": "n_embd",
    "block_count": "n_layer",
    "feed_forward_length": "n_inner",
    "attention.head_count": "n_head",
    "vocab_size": "vocab_size",
    "attention.layer_norm_epsilon": "layer_norm_epsilon",
}
"""GGUF key below the architecture's prefix -> key of ``config.json``."""

ACTIVATIONS = {"gemma3": "gelu_pytorch_tanh", "gpt2": "gelu_new"}
"""What llama.cpp computes; silu for every architecture that is not listed."""

LARGEST_GEMMA3 = 62
"""Layers of gemma-3-27b: llama.cpp recognises it by them and scales its attention differently."""
GEMMA3_PERIOD = 6
"""Every sixth layer of gemma 3 attends to everything."""

CLASSES = {
    "llama": "LlamaForCausalLM",
    "mixtral": "MixtralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "qwen3_moe": "Qwen3MoeForCausalLM",
    "gemma3_text": "Gemma3ForCausalLM",
    "phi3": "Phi3ForCausalLM",
    "gpt2": "GPT2LMHeadModel",
}


def complete(config: Config) -> dict[str, Any]:
    """The configuration with transformers' defaults filled in and old spellings brought up to date.

    Raises:
        ExportError: unsupported architecture, or values that transformers refuses.
    """
    from transformers import AutoConfig

    architecture(config)
    values = {key: value for key, value in config.items() if key not in ("model_type", "quantization_config")}
    try:
        full: dict[str, Any] = AutoConfig.for_model(config["model_type"], **values).to_dict()
    except Exception as error:  # transformers raises whatever its configuration classes do
        raise ExportError(f"config.json is not valid: {str(error).splitlines()[0]}") from error
    return full


def hyper_parameters(config: Config) -> dict[str, Value]:
    """GGUF keys of a completed configuration.

    Raises:
        ExportError: llama.cpp computes something else than this configuration asks for.
    """
    arch = architecture(config)
    _refuse_other_functions(arch, config)
    keys: dict[str, Value] = {}
    for key, name in (GPT2 if arch == "gpt2" else GENERAL).items():
        if config.get(name) is not None:
            keys[key] = f32(config[name]) if key.endswith("epsilon") else u32(config[name])
    if arch == "gpt2":
        keys.setdefault("feed_forward_length", u32(4 * config["n_embd"]))
    else:
        keys |= _attention_keys(arch, config) | rope_keys(arch, config)
    return {f"{arch}.{key}": value for key, value in keys.items()}


def head_dim(config: Config) -> int:
    """Dimensions of an attention head."""
    return int(config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"])


def _attention_keys(arch: str, config: Config) -> dict[str, Value]:
    size = head_dim(config)
    keys = {"attention.key_length": u32(size), "attention.value_length": u32(size)}
    window = config.get("sliding_window") if config.get("use_sliding_window", True) else None
    if arch in ("gemma3", "phi3"):
        keys["attention.sliding_window"] = u32(window or 0)
    if config.get("final_logit_softcapping") and arch == "gemma3":
        keys["final_logit_softcapping"] = f32(config["final_logit_softcapping"])
    if window and arch != "gemma3":
        # llama.cpp attends to everything in these: both agree as long as the text fits into the window.
        keys["context_length"] = u32(min(window, config["max_position_embeddings"]))
    return keys


def _refuse_other_functions(arch: str, config: Config) -> None:
    names = ("hidden_activation", "hidden_act", "activation_function")
    activation = next((config[name] for name in names if config.get(name)), None)
    expected = ACTIVATIONS.get(arch, "silu")
    if activation != expected:
        raise ExportError(f"llama.cpp runs {arch} with the activation {expected}, the model has {activation}")
    for key, wanted in _FIXED.get(arch, {}).items():
        if config.get(key, wanted) != wanted:
            raise ExportError(f"llama.cpp runs {arch} with {key} = {wanted}, the model has {config[key]}")
    if arch == "gemma3":
        _refuse_other_gemma3(config)
    if arch == "phi3" and head_dim(config) * config["num_attention_heads"] != config["hidden_size"]:
        raise ExportError("llama.cpp runs phi3 with heads that fill the hidden size, the model has others")


_FIXED: dict[str, dict[str, Any]] = {
    "qwen3": {"attention_bias": False},
    "qwen3moe": {
        "attention_bias": False,
        "norm_topk_prob": True,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
    },
    "gemma3": {"attn_logit_softcapping": None, "use_bidirectional_attention": False, "attention_bias": False},
    "gpt2": {
        "scale_attn_weights": True,
        "scale_attn_by_inverse_layer_idx": False,
        "add_cross_attention": False,
    },
}


def _refuse_other_gemma3(config: Config) -> None:
    scalar = gemma3_scalar(config["num_hidden_layers"], config)
    if config["query_pre_attn_scalar"] != scalar:
        raise ExportError(
            f"llama.cpp scales the attention of this gemma3 by 1/sqrt({scalar}), "
            f"the model by 1/sqrt({config['query_pre_attn_scalar']})"
        )
    window = bool(config.get("sliding_window"))
    if config["layer_types"] != gemma3_layers(config["num_hidden_layers"], window):
        raise ExportError(
            f"llama.cpp runs gemma3 with full attention in every {GEMMA3_PERIOD}th layer, "
            f"the model has {config['layer_types']}"
        )


def gemma3_scalar(layers: int, config: Config) -> int:
    """llama.cpp divides the attention scores of gemma3 by the root of this."""
    if layers == LARGEST_GEMMA3:
        return int(config["hidden_size"] // config["num_attention_heads"])
    return head_dim(config)


def gemma3_layers(layers: int, window: bool) -> list[str]:
    """What each layer of gemma3 attends to in llama.cpp."""
    full = GEMMA3_PERIOD if window else 1
    return ["sliding_attention" if (layer + 1) % full else "full_attention" for layer in range(layers)]


def read_config(header: Header, read: Callable[[str], Tensor]) -> dict[str, Any]:
    """``config.json`` of the model in a GGUF file.

    Args:
        header: the file's metadata and tensor table.
        read: loads a tensor by its GGUF name.

    Raises:
        CheckpointError: an architecture that Poise does not read, or metadata that is missing or absurd.
    """
    arch = header.get("general.architecture")
    if arch not in ARCHITECTURES.values():
        known = ", ".join(sorted(set(ARCHITECTURES.values())))
        raise CheckpointError(f"GGUF files of the architecture {arch!r} are not supported: there is {known}")
    kind = _model_type(arch, header)
    config: dict[str, Any] = {"model_type": kind, "architectures": [CLASSES[kind]]}
    config |= _read_table(arch, header)
    config["vocab_size"] = header.tensors["token_embd.weight"].shape[0]
    config["tie_word_embeddings"] = "output.weight" not in header.tensors
    for name in ("bos", "eos", "padding"):
        config[f"{name.removesuffix('ding')}_token_id"] = header.get(f"tokenizer.ggml.{name}_token_id")
    return config if arch == "gpt2" else config | _read_details(arch, kind, config, header, read)


def _read_table(arch: str, header: Header) -> dict[str, Any]:
    """The plain numbers; each must be of a size that a model can have."""
    numbers = {}
    for key, name in (GPT2 if arch == "gpt2" else GENERAL).items():
        value = header.get(f"{arch}.{key}") or None  # no experts may be spelled as 0 experts
        largest = LARGEST.get(key, 2**31)
        if value is None and key in REQUIRED:
            raise CheckpointError(f"the file lacks {arch}.{key}; it is no complete model")
        if value is not None and not (isinstance(value, int | float) and 0 < value < largest):
            raise CheckpointError(f"{arch}.{key} is {str(value)[:40]}, expected a number below {largest}")
        if value is not None:
            numbers[name] = value
    if header.get(f"{arch}.block_count") > len(header.tensors) or "token_embd.weight" not in header.tensors:
        raise CheckpointError(
            "the file has fewer tensors than blocks, or no token_embd.weight; it is no complete model"
        )
    return numbers


REQUIRED = ("context_length", "embedding_length", "block_count", "attention.head_count")
LARGEST = {
    "attention.head_count": 2**16,
    "attention.head_count_kv": 2**16,
    "expert_count": 2**16,
    "expert_used_count": 2**16,
}
"""Bounds on what is built one by one."""


def _model_type(arch: str, header: Header) -> str:
    if arch == "llama":
        return "mixtral" if header.get("llama.expert_count", 0) else "llama"
    return next(kind for kind, name in ARCHITECTURES.items() if name == arch)


def _read_details(
    arch: str, kind: str, config: Config, header: Header, read: Callable[[str], Tensor]
) -> dict[str, Any]:
    """What only some architectures have: head size, biases, windows, rotary embeddings, experts."""
    heads = config["num_attention_heads"]
    size = header.get(f"{arch}.attention.key_length") or config["hidden_size"] // heads
    if not isinstance(size, int) or not 0 < size < 2**16:
        raise CheckpointError(f"{arch}.attention.key_length is {size!r}, expected a number below {2**16}")
    details: dict[str, Any] = {"num_key_value_heads": config.get("num_key_value_heads", heads)}
    details["rope_parameters"] = read_rope(arch, header, size, config["max_position_embeddings"], read)
    if kind not in ("phi3", "qwen2"):
        details["head_dim"] = size
    if kind == "llama":
        details["attention_bias"] = "blk.0.attn_q.bias" in header.tensors
        details["mlp_bias"] = "blk.0.ffn_up.bias" in header.tensors
    if kind == "qwen3_moe":
        details["norm_topk_prob"] = True
    if kind == "phi3":
        factors = details["rope_parameters"]
        original = factors.get("original_max_position_embeddings", config["max_position_embeddings"])
        details["original_max_position_embeddings"] = original
        details["sliding_window"] = header.get("phi3.attention.sliding_window") or None
    if kind == "gemma3_text":
        details |= _read_gemma3({**config, **details}, header)
    return details


def _read_gemma3(config: Config, header: Header) -> dict[str, Any]:
    layers = config["num_hidden_layers"]
    window = header.get("gemma3.attention.sliding_window", 0)
    return {
        "sliding_window": window or None,
        "layer_types": gemma3_layers(layers, bool(window)),
        "query_pre_attn_scalar": gemma3_scalar(layers, config),
        "final_logit_softcapping": header.get("gemma3.final_logit_softcapping"),
    }
