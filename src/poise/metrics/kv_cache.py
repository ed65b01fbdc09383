"""What every token of context takes in memory while a model runs."""

from typing import Any, ClassVar

from poise.core.metric import Score, Subject, SystemMetric

BYTES = 2
"""Keys and values are kept in 16 bits unless an engine is told otherwise."""


class KvCache(SystemMetric):
    """Bytes of keys and values a token, from the configuration: 2 x layers x key-value heads x size of a head x 2 bytes. Layers with
    a sliding window stop growing at its length, which is not counted here."""

    unit: ClassVar[str] = "bytes"
    protocol: ClassVar[str] = "keys and values of one token in 16 bits, from the configuration"

    def measure(self, subjects: list[Subject]) -> list[list[Score]]:
        return [self._measure(subject.checkpoint.config) for subject in subjects]

    def _measure(self, config: dict[str, Any]) -> list[Score]:
        size = _bytes(config)
        known = size > 0
        value = float(size) if known else float("nan")
        score = Score(
            name="kv_cache_per_token",
            value=value,
            unit="bytes",
            protocol=self.protocol,
            n=int(known),
            n_unscored=int(not known),
        )
        return [score]


def _bytes(config: dict[str, Any]) -> int:
    """0 where the configuration does not say."""
    layers = config.get("num_hidden_layers") or config.get("n_layer") or 0
    heads = config.get("num_attention_heads") or config.get("n_head") or 0
    hidden = config.get("hidden_size") or config.get("n_embd") or 0
    groups = config.get("num_key_value_heads") or heads
    head = config.get("head_dim") or (hidden // heads if heads else 0)
    return int(2 * layers * groups * head * BYTES)
