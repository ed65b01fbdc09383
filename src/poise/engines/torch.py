"""transformers on torch: every checkpoint, with its weights as Poise decodes them.

The model computes in float32 with de-quantized weights, so that what is measured is the quantization and
not the arithmetic of a kernel. Matrices whose plan rounds activations get the same per-token rounding
here that integer engines apply (symmetric, dynamic, scale = absmax / (2^(b-1) - 1/2)).
"""

import time
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from poise.core.checkpoint import Checkpoint
from poise.core.engine import Engine, Generation
from poise.core.errors import EngineError

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class Torch(Engine):
    """Runs a causal language model of transformers.

    Args:
        dtype: what it computes in.
    """

    reads: ClassVar[tuple[str, ...]] = ("huggingface", "gguf")

    def __init__(self, dtype: str = "float32") -> None:
        if dtype not in DTYPES:
            raise EngineError(f"the torch engine computes in {', '.join(DTYPES)}, not in {dtype}")
        self._dtype = DTYPES[dtype]
        self._model: Any = None

    def load(self, checkpoint: Checkpoint) -> None:
        from transformers import AutoConfig, AutoModelForCausalLM

        values = {
            k: v for k, v in checkpoint.config.items() if k not in ("model_type", "quantization_config")
        }
        config = AutoConfig.for_model(checkpoint.config["model_type"], **values)
        weights = {name: checkpoint.read(name).to(self._dtype) for name in checkpoint.tensors()}
        model_class = AutoModelForCausalLM._model_mapping[type(config)]
        model, report = model_class.from_pretrained(
            None, config=config, state_dict=weights, dtype=self._dtype, output_loading_info=True
        )
        tied = getattr(config.get_text_config(), "tie_word_embeddings", False)
        missing = [name for name in report["missing_keys"] if not (tied and name == "lm_head.weight")]
        if missing or report["mismatched_keys"]:
            raise EngineError(
                f"{checkpoint.source}: lacks {sorted(missing) or sorted(report['mismatched_keys'])}"
            )
        self._model = model.eval()
        for path, bits in checkpoint.activations().items():
            self._model.get_submodule(path).register_forward_pre_hook(_round_inputs(bits))

    @property
    def model(self) -> nn.Module:
        """The loaded model, for collectors that watch it read."""
        module: nn.Module = self._model
        return module

    @torch.no_grad()
    def logits(self, tokens: list[int]) -> Tensor:
        scores: Tensor = self._model(input_ids=torch.tensor([tokens]), use_cache=False).logits[0]
        return scores.float()

    @torch.no_grad()
    def generate(self, tokens: list[int], n: int, stop: Collection[int] = ()) -> Generation:
        start = time.perf_counter()
        made: list[int] = []
        seconds: list[float] = []
        ids, cache = torch.tensor([tokens]), None
        for _ in range(n):
            seen = torch.ones(1, len(tokens) + len(made), dtype=torch.long)
            output = self._model(
                input_ids=ids, attention_mask=seen, past_key_values=cache, use_cache=True, logits_to_keep=1
            )
            cache = output.past_key_values
            made.append(int(output.logits[0, -1].argmax()))
            seconds.append(time.perf_counter() - start)
            if made[-1] in stop:
                break
            ids = torch.tensor([made[-1:]])
        return Generation(tokens=made, seconds=seconds)

    def generate_many(self, prompts: list[list[int]], n: int) -> list[list[int]]:
        advance, made = self.writer(), [torch.tensor(prompts)]
        for _ in range(n):
            made.append(advance(made[-1]).argmax(-1, keepdim=True))
        found: list[list[int]] = torch.cat(made[1:], -1).tolist()
        return found

    def writer(self) -> Callable[[Tensor], Tensor]:
        """Begins a batch of texts: takes their newest tokens [texts, n], answers with the next scores, [texts, vocabulary]."""
        cache = None

        @torch.no_grad()
        def advance(new: Tensor) -> Tensor:
            nonlocal cache
            with _single_queries(self._model) if new.shape[1] == 1 else nullcontext():
                output = self._model(input_ids=new, past_key_values=cache, use_cache=True, logits_to_keep=1)
            cache = output.past_key_values
            scores: Tensor = output.logits[:, -1]
            return scores

        return advance

    def close(self) -> None:
        self._model = None


@contextmanager
def _single_queries(model: Any) -> Iterator[None]:
    """Attention of one token a text as plain products: torch's fused kernel is made for many, and takes several times as long."""
    usual = model.config._attn_implementation
    if usual != "sdpa":
        yield
        return
    model.set_attn_implementation("eager")
    try:
        yield
    finally:
        model.set_attn_implementation(usual)


def _round_inputs(bits: int) -> Any:
    """A forward pre-hook that rounds the last axis of a layer's input as integer engines do."""
    highest = 2 ** (bits - 1) - 1

    def hook(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        x = args[0]
        scale = (x.abs().amax(-1, keepdim=True).float() / (highest + 0.5)).clamp(
            min=torch.finfo(torch.float32).tiny
        )
        rounded = (x.float() / scale).round().clamp(-highest - 1, highest) * scale
        return rounded.to(x.dtype), *args[1:]

    return hook
