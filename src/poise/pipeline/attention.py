"""How much every token is attended to, which is how much an error of its value costs."""

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import TorchFunctionMode

from poise.pipeline.blocks import Blocks, Reached


@torch.no_grad()
def attended(blocks: Blocks, hidden: Tensor) -> Tensor | None:
    """Attention that the open block pays to every token, mean over its heads of the sum over all queries.

    What queries get of errors e_t of values is sum_t a_qt e_t, whose square is at most sum_t a_qt |e_t|^2, since the a_qt of
    a query sum to one. So an error at token t counts for sum_q a_qt; the first token, to which heads attend when they look
    for nothing, for hundreds of others. (A bound of what queries get, whose exact Hessian is one for each head of values:
    the attention-aware reconstruction of Kim et al. 2024, aespa, arXiv 2402.08958.)

    Args:
        hidden: what enters the block, [batch, tokens, hidden].

    Returns:
        [batch * tokens], with a mean of one; None if the block attends to nothing in a way that shows.
    """
    seen = _Attention()
    try:
        with seen:
            blocks.run(hidden)
    except Reached:
        pass
    return seen.weights


class _Attention(TorchFunctionMode):
    """Ends a run where it attends for the first time."""

    def __init__(self) -> None:
        super().__init__()
        self.weights: Tensor | None = None

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is scaled_dot_product_attention:
            self.weights = received(*args, **(kwargs or {})).flatten()
            raise Reached
        return func(*args, **(kwargs or {}))


def received(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """What each key gets from all queries, mean over heads, [batch, tokens], given the arguments of an attention.

    One head of one text at a time: products of all queries with all keys are large.
    """
    (batch, heads, length, channels), tokens = query.shape, key.shape[2]
    mask = torch.ones(length, tokens, dtype=torch.bool)
    mask = mask.tril() if is_causal else mask if attn_mask is None else attn_mask
    bias = torch.zeros(mask.shape).masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else mask
    bias, shared = bias.expand(batch, heads, length, tokens), heads // key.shape[1]
    found = torch.zeros(batch, tokens)
    for text in range(batch):
        for head in range(heads):
            products = query[text, head] @ key[text, head // shared].T
            products *= channels**-0.5 if scale is None else scale
            found[text] += (products + bias[text, head]).softmax(-1).sum(0)
    return found / heads
