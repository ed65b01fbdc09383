"""Rotary embeddings: transformers' ``rope_parameters`` as GGUF keys and tensors, and back.

A pair of dimensions turns by position * theta^(-2i/d). What models do to reach longer contexts:

    linear     every frequency divided by a factor                     keys
    yarn       low frequencies divided, high ones kept, a ramp between  keys; attention scaled
    llama3     the same idea with another ramp                          a tensor of divisors
    longrope   two sets of divisors, for short and long texts           two tensors; attention scaled
"""

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from poise.core.errors import CheckpointError, ExportError
from poise.layouts.gguf_header import Header, Value, f32, text, u32

Config = Mapping[str, Any]
DEFAULT_THETA = 10000.0
LLAMA3_LENGTHS = [2**power for power in range(5, 21)]
"""Original context lengths that are tried when a file holds llama3's divisors only."""


def rope_keys(arch: str, config: Config) -> dict[str, Value]:
    """GGUF keys, below the architecture's prefix.

    Raises:
        ExportError: llama.cpp has no such scaling for this architecture.
    """
    rope = global_rope(config)
    kind = rope.get("rope_type", "default")
    size = int(config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"])
    share = rope.get("partial_rotary_factor", 1.0)
    if share != 1.0 and arch != "phi3":
        raise ExportError(f"llama.cpp rotates whole heads of {arch}, the model {share} of them")
    keys = {"rope.dimension_count": u32(int(size * share)), "rope.freq_base": f32(rope["rope_theta"])}
    if arch == "gemma3":
        keys["rope.freq_base_swa"] = f32(_local_theta(config))
    if arch not in _SCALINGS.get(kind, ()):
        raise ExportError(f"llama.cpp has no rope scaling {kind!r} for {arch}: {dict(rope)}")
    if kind == "linear":
        keys |= {"rope.scaling.type": text("linear"), "rope.scaling.factor": f32(rope["factor"])}
    if kind == "yarn":
        keys |= _yarn_keys(rope)
    if kind == "longrope":
        keys |= _longrope_keys(config, rope)
    return keys


_PLAIN = ("llama", "qwen2", "qwen3", "qwen3moe")
_SCALINGS = {
    "default": (*_PLAIN, "gemma3", "phi3"),
    "linear": (*_PLAIN, "gemma3"),
    "yarn": _PLAIN,
    "llama3": ("llama",),
    "longrope": ("phi3",),
}
"""Scaling -> architectures for which llama.cpp was found to compute what transformers computes."""


def global_rope(config: Config) -> Mapping[str, Any]:
    """Parameters of the layers with full attention."""
    rope: dict[str, Any] = config["rope_parameters"]
    found: dict[str, Any] = rope.get("full_attention", rope)
    return found


def _local_theta(config: Config) -> float:
    local = config["rope_parameters"].get("sliding_attention", global_rope(config))
    if local.get("rope_type", "default") != "default":
        raise ExportError(f"llama.cpp scales no rope of windowed layers, the model has {dict(local)}")
    return float(local["rope_theta"])


def _yarn_keys(rope: Mapping[str, Any]) -> dict[str, Value]:
    """llama.cpp reads no other settings of yarn for these architectures than factor and length."""
    usual: dict[str, Any] = {
        "beta_fast": 32,
        "beta_slow": 1,
        "attention_factor": 0.1 * math.log(rope["factor"]) + 1,
    }
    usual |= {"truncate": True, "mscale": None, "mscale_all_dim": None}
    for key, value in usual.items():
        found = rope.get(key)
        if found is not None and found != value:
            raise ExportError(f"llama.cpp runs yarn with {key} = {value}, the model has {found}")
    return {
        "rope.scaling.type": text("yarn"),
        "rope.scaling.factor": f32(rope["factor"]),
        "rope.scaling.original_context_length": u32(rope["original_max_position_embeddings"]),
    }


def _longrope_keys(config: Config, rope: Mapping[str, Any]) -> dict[str, Value]:
    original = rope["original_max_position_embeddings"]
    factor = rope.get("factor") or config["max_position_embeddings"] / original
    scale = rope.get("attention_factor")
    if scale is None:
        scale = math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 else 1.0
    return {
        "rope.scaling.type": text("longrope"),
        "rope.scaling.original_context_length": u32(original),
        "rope.scaling.attn_factor": f32(scale),
    }


def rope_tensors(config: Config) -> dict[str, Tensor]:
    """Divisors of the frequencies as GGUF tensors, float32 [rotated dimensions / 2]."""
    if "rope_parameters" not in config:
        return {}
    rope = global_rope(config)
    kind = rope.get("rope_type", "default")
    if kind == "llama3":
        size = int(config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"])
        return {"rope_freqs.weight": llama3_divisors(size, rope)}
    if kind == "longrope":
        return {
            f"rope_factors_{length}.weight": torch.tensor(rope[f"{length}_factor"], dtype=torch.float32)
            for length in ("long", "short")
        }
    return {}


def llama3_divisors(size: int, rope: Mapping[str, Any]) -> Tensor:
    """What llama3 divides each frequency by: 1 for short waves, ``factor`` for long ones."""
    exponent = torch.arange(0, size, 2, dtype=torch.float32) / size
    frequency: Tensor = rope["rope_theta"] ** -exponent
    turns = rope["original_max_position_embeddings"] * frequency / (2 * math.pi)
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    smooth = ((turns - low) / (high - low)).clamp(0, 1)
    divisors: Tensor = 1 / ((1 - smooth) / rope["factor"] + smooth)
    return divisors


def read_rope(
    arch: str, header: Header, size: int, context: int, read: Callable[[str], Tensor]
) -> dict[str, Any]:
    """transformers' ``rope_parameters`` of a GGUF file.

    Args:
        size: dimensions of a head.
        context: context length.
        read: loads a tensor by its GGUF name.

    Raises:
        CheckpointError: a scaling that Poise cannot express.
    """
    prefix = f"{arch}.rope."
    theta = header.get(prefix + "freq_base", DEFAULT_THETA)
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": theta}
    if arch == "phi3":
        rope["partial_rotary_factor"] = header.get(prefix + "dimension_count", size) / size
    kind = header.get(prefix + "scaling.type", "linear")
    factor = header.get(prefix + "scaling.factor") or header.get(prefix + "scale_linear") or 1.0
    original = header.get(prefix + "scaling.original_context_length", context)
    if "rope_freqs.weight" in header.tensors:
        rope |= _read_llama3(read("rope_freqs.weight"), size, theta)
    elif "rope_factors_long.weight" in header.tensors:
        rope |= _read_longrope(header, prefix, original, read)
    elif kind == "yarn":
        rope |= {"rope_type": "yarn", "factor": factor, "original_max_position_embeddings": original}
    elif kind not in ("linear", "none"):
        raise CheckpointError(f"rope scaling {kind!r} is not supported")
    elif factor != 1.0 and kind == "linear":
        rope |= {"rope_type": "linear", "factor": factor}
    if arch != "gemma3":
        return rope
    local = {"rope_type": "default", "rope_theta": header.get(prefix + "freq_base_swa", DEFAULT_THETA)}
    return {"full_attention": rope, "sliding_attention": local}


def _read_longrope(
    header: Header, prefix: str, original: int, read: Callable[[str], Tensor]
) -> dict[str, Any]:
    factors = {
        f"{length}_factor": read(f"rope_factors_{length}.weight").tolist() for length in ("long", "short")
    }
    scale = header.get(prefix + "scaling.attn_factor", 1.0)
    return {
        "rope_type": "longrope",
        "original_max_position_embeddings": original,
        "attention_factor": scale,
        **factors,
    }


def _read_llama3(divisors: Tensor, size: int, theta: float) -> dict[str, Any]:
    """Parameters that give these divisors. The file keeps none; all models so far have factors 1 and 4."""
    rope: dict[str, Any] = {"rope_type": "llama3", "rope_theta": theta, "factor": float(divisors.max())}
    rope |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
    for length in LLAMA3_LENGTHS:
        rope["original_max_position_embeddings"] = length
        candidate = llama3_divisors(size, rope)
        if candidate.shape == divisors.shape and torch.allclose(candidate, divisors, rtol=1e-4):
            return rope
    raise CheckpointError("rope_freqs.weight holds divisors that are not those of llama3 scaling")
