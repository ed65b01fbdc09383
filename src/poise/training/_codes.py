"""Weights whose codes are trained, with the parameters in which decoding is linear.

A weight is a place between two levels and counts as the nearest level. Its gradient goes straight through the rounding:
the loss falls with the place as fast as it would if the value did not jump. (Bengio et al. 2013, arXiv 1308.3432; places
in units of levels, as in LSQ, Esser et al. 2019, arXiv 1902.08153.)
"""

from typing import Any

import torch
from torch import Tensor, nn

from poise.core.format import QTensor
from poise.core.precision import product_dtype
from poise.core.slabs import map_slabs
from poise.kernels.ladders import LinearLadders, begin, bits, ladders_of
from poise.kernels.places import pass_through, values_at

INSIDE = 0.4
"""How far from its level a place may begin: noise of the first steps moves no code."""


class LearnedWeight(nn.Module):
    """A weight of a scalar format as places and parameters.

    Args:
        original: the weight before it was quantized, [rows, columns]; places begin as near to it as the codes allow.
        weight: the quantized one.
        transposed: whether the model stores [in, out].
    """

    def __init__(self, original: Tensor, weight: QTensor, transposed: bool) -> None:
        super().__init__()
        self.weight, self.transposed = weight, transposed
        rows, columns = weight.shape
        ladders = ladders_of(weight.format, weight.params, rows, columns)
        assert ladders is not None  # asked of scalar formats alone
        self.ladders = ladders
        self.parts = LinearLadders(weight.format, weight.params, ladders, weight.format.linear, columns)
        place, offset = begin(original.float().contiguous(), ladders, weight.codes, INSIDE)
        last = ladders.values.shape[2] - 1
        self.places = nn.Parameter((place + offset).clamp_(-0.5, last + 0.5), requires_grad=False)
        self.linear = nn.ParameterDict(
            {
                key: nn.Parameter(weight.params[key].float(), requires_grad=False)
                for key in weight.format.linear
            }
        )

    def forward(self, _: Tensor) -> Tensor:
        keys = list(self.linear)
        whole: Tensor = _Settle.apply(
            self.parts, self.ladders.values, keys, self.places, *self.linear.values()
        )  # type: ignore[no-untyped-call]
        whole = whole.to(product_dtype())
        return whole.T if self.transposed else whole

    def result(self) -> QTensor:
        """Codes and parameters of now, as they are stored."""
        linear = {key: value.detach() for key, value in self.linear.items()}
        last = self.ladders.values.shape[2] - 1
        index = (self.places.detach() + 0.5).floor_().clamp_(0, last)
        params = {
            key: linear[key].to(value.dtype) if key in linear else value
            for key, value in self.weight.params.items()
        }
        return QTensor(codes=self.ladders.decode(index), params=params, format=self.weight.format)


class _Settle(torch.autograd.Function):
    """Values of the levels nearest to places; the gradient goes to the places and to linear parameters."""

    @staticmethod
    def forward(
        ctx: Any, parts: LinearLadders, fixed: Tensor, keys: list[str], places: Tensor, *linear: Tensor
    ) -> Tensor:
        # Of a format without linear parameters, the ladders that it has.
        values = parts.values(dict(zip(keys, linear, strict=True))) if keys else fixed
        stored, found = values.to(torch.bfloat16), torch.empty(places.shape, dtype=torch.bfloat16)
        plain = places.detach()  # threads of slabs do not know that no gradient is wanted

        def work(rows: slice) -> None:
            values_at(plain[rows].numpy(), bits(stored[rows]), parts.wide, bits(found[rows]))

        map_slabs(work, *places.shape)
        ctx.parts, ctx.keys = parts, keys
        ctx.save_for_backward(places, values)
        return found

    @staticmethod
    def backward(ctx: Any, *outer: Tensor) -> tuple[Any, ...]:
        places, values = (saved.detach() for saved in ctx.saved_tensors)
        gradient, slope = outer[0].to(torch.bfloat16).contiguous(), torch.empty(places.shape)

        def work(rows: slice) -> list[Tensor]:
            arrays = (bits(gradient[rows]), places[rows].numpy(), values[rows].numpy())
            pass_through(*arrays, ctx.parts.wide, slope[rows].numpy())
            return [ctx.parts.collected(key, gradient, places, rows) for key in ctx.keys]

        slabs = map_slabs(work, *places.shape)
        return None, None, None, slope, *(torch.cat(found) for found in zip(*slabs, strict=True))
