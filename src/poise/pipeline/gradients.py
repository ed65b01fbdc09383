"""What the outputs of every linear matter to the loss, token by token. The whole model is in memory for this."""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from poise.core.checkpoint import Checkpoint
from poise.core.precision import product_name
from poise.core.registry import get
from poise.pipeline.progress import Progress

BATCH_TOKENS = 2048
"""Tokens that go through the model at a time."""
SEED = 0
"""Of the tokens that are drawn as labels."""


def squared_gradients(
    checkpoint: Checkpoint,
    windows: Sequence[Sequence[int]],
    runs: dict[str, int],
    progress: Progress,
) -> dict[str, Tensor]:
    """Mean squared gradient of the loss by the outputs of linears, for each run of rows.

    The loss is the sum over tokens of the cross-entropy with a token that is drawn from the model's own distribution.

    Args:
        runs: path of a linear module -> equal runs of its outputs.

    Returns:
        path -> float32 [tokens, runs], tokens in the order of the windows, with a mean of one in every run.
    """
    found: dict[str, list[Tensor]] = {path: [] for path in runs}
    dice = torch.Generator().manual_seed(SEED)
    batch = max(1, BATCH_TOKENS // len(windows[0]))
    with get("engine", "torch")(dtype=product_name()) as engine:
        engine.load(checkpoint)
        model: Any = engine.model
        model.requires_grad_(False)
        handles = [
            model.get_submodule(path).register_forward_hook(_watcher(found[path], count))
            for path, count in runs.items()
        ]
        # Gradients begin at what the embedding gives.
        handles.append(model.get_input_embeddings().register_forward_hook(_begin))
        for start in range(0, len(windows), batch):
            ids = torch.tensor(windows[start : start + batch])
            scores = model(input_ids=ids, use_cache=False).logits.float().flatten(0, 1)
            drawn = torch.multinomial(scores.detach().softmax(-1), 1, generator=dice).squeeze(1)
            torch.nn.functional.cross_entropy(scores, drawn, reduction="sum").backward()  # type: ignore[no-untyped-call]
            progress("weigh tokens by their gradients", min(start + batch, len(windows)), len(windows))
        for handle in handles:
            handle.remove()
    whole = {path: torch.cat(parts) for path, parts in found.items()}
    return {
        path: value / value.mean(0).clamp(min=torch.finfo(torch.float32).tiny)
        for path, value in whole.items()
    }


def _begin(_: Any, __: Any, output: Tensor) -> Tensor:
    return output.detach().requires_grad_(True)


def _watcher(parts: list[Tensor], runs: int) -> Any:
    def hook(_: Any, __: Any, output: Tensor) -> None:
        rows = output.shape[-1]
        edges = [rows * run // runs for run in range(runs + 1)]

        def keep(gradient: Tensor) -> None:
            square = gradient.float().square().flatten(0, -2)
            parts.append(torch.stack([square[:, a:b].mean(1) for a, b in pairwise(edges)], dim=1))

        output.register_hook(keep)  # type: ignore[no-untyped-call]

    return hook
