"""How the scales of a format are stored.

    float16, bfloat16, float32   as they are
    e8m0                         a power of two, 2^(e - 127): one byte (OCP Microscaling v1.0, 5.4)
    double                       c * step: c one byte, step float32 for each 256 scales of a row

``double`` is the double quantization of QLoRA (Dettmers et al. 2023, section 3) with two deviations: the second
level is linear instead of an 8-bit float with its mean taken off, and runs along a row, so that rows stay
independent. Scales that may be negative take c from -127 to 127.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from poise.core.errors import FormatError
from poise.core.format import Params
from poise.formats._groups import ranges
from poise.formats._search import Floats, Levels, best_candidate, best_scales

DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}
KINDS = (*DTYPES, "e8m0", "double")
SECOND = 256
"""Scales that share a step of the second level."""
POLISH = 2
"""Rounds of (nearest levels, best scale) after the best try; more changes the error by less than a thousandth."""


@dataclass(frozen=True)
class Scales:
    """One of ``KINDS``. Values are float32 [rows, groups].

    Attributes:
        signed: whether negative scales occur.
    """

    kind: str
    signed: bool = False

    @property
    def negative(self) -> bool:
        """Whether this kind can hold what ``signed`` asks for."""
        return self.signed and self.kind != "e8m0"

    def bits(self, groups: int) -> float:
        """Bits of the scales of one row."""
        if self.kind in DTYPES:
            return 8 * DTYPES[self.kind].itemsize * groups
        return 8 * groups + (32 * -(-groups // SECOND) if self.kind == "double" else 0)

    def store(self, values: Tensor) -> Params:
        """The nearest that can be stored.

        Raises:
            FormatError: a value that the kind cannot hold; the message says which can.
        """
        if self.kind == "e8m0":
            return {"scale": (_exponent(values) + 127).to(torch.uint8)}
        if self.kind == "double":
            top = 127 if self.signed else 255
            runs = -(-values.shape[1] // SECOND)
            wide = pad(values, (0, runs * SECOND - values.shape[1])).view(values.shape[0], runs, SECOND)
            step = wide.abs().amax(-1) / top
            codes = (wide / divisor(step).unsqueeze(-1)).round().flatten(1)
            kept = codes[:, : values.shape[1]].to(torch.int8 if self.signed else torch.uint8)
            return {"scale": kept.contiguous(), "scale_step": step}
        dtype = DTYPES[self.kind]
        stored = values.to(dtype)
        if bool(torch.isinf(stored).any()):
            raise FormatError(
                f"its range needs a scale of {float(values.abs().max()):.3g}, more than {dtype} holds: "
                "use scale='bfloat16' or 'float32'"
            )
        return {"scale": stored}

    def load(self, params: Params) -> Tensor:
        """Stored scales as float32."""
        scale = params["scale"]
        if self.kind == "e8m0":
            return power_of_two(scale.int() - 127)
        if self.kind == "double":
            return scale.float() * self.whole_steps(params)["scale_step"]
        return scale.float()

    def whole_steps(self, params: Params) -> Params:
        """Parameters with a second-level step for every scale, so that they can be sliced by columns."""
        step, count = params.get("scale_step"), params["scale"].shape[1]
        if step is None or step.shape[1] in (1, count):
            return params
        return {**params, "scale_step": step.repeat_interleave(SECOND, dim=1)[:, :count]}

    def search(
        self,
        x: Tensor,
        w: Tensor,
        n: int,
        levels: Levels,
        ratios: Floats,
        cover: Callable[[Tensor, Tensor], Tensor],
    ) -> Tensor:
        """Scales of least squared error that can be stored, [rows, groups].

        Storing moves a scale, and with many levels the error jumps on the way: what was best need not be any more, and
        the one that just covers the group may have become better.

        Args:
            x, w: weights and their importance, in groups of n.
            ratios: scales to try, as multiples of the one that covers the group.
            cover: that one, of the lowest and the highest weight of a group.
        """
        arrays = (x.numpy(), w.numpy(), n, levels)
        found = torch.from_numpy(best_scales(*arrays, ratios, self.negative, POLISH)[0])
        if self.kind == "e8m0":
            covering = self.covering(cover(*ranges(x, n)))
            near = torch.cat([self.around(found), covering.unsqueeze(-1)], dim=-1)
        elif self.kind in ("float16", "bfloat16"):
            near = torch.stack([found, cover(*ranges(x, n))], dim=-1).to(DTYPES[self.kind]).float()
        else:
            return found
        best = torch.from_numpy(best_candidate(*arrays, near.numpy()))
        return near.gather(-1, best.unsqueeze(-1)).squeeze(-1)

    def around(self, values: Tensor) -> Tensor:
        """The powers of two near every value, [rows, groups, 3], the nearest first."""
        nearest = _exponent(values)
        near = torch.stack([(nearest + step).clamp(-127, 127) for step in (0, -1, 1)], dim=-1)
        return power_of_two(near)

    def covering(self, values: Tensor) -> Tensor:
        """Scales that are storable and not smaller, where the kind is coarse."""
        if self.kind != "e8m0":
            return values
        exponent = torch.ceil(torch.log2(values.clamp(min=2.0**-127))).clamp(-127, 127)
        exponent += power_of_two(exponent) < values  # log2 rounds
        return power_of_two(exponent.clamp(max=127))


def power_of_two(exponent: Tensor) -> Tensor:
    """2^exponent, exact, float32."""
    return torch.ldexp(torch.ones(exponent.shape), exponent.int())


def _exponent(values: Tensor) -> Tensor:
    """Nearest power of two, in the logarithm; int32."""
    return torch.log2(values.abs().clamp(min=2.0**-127)).round().clamp(-127, 127).int()


def divisor(values: Tensor) -> Tensor:
    """Replaces zeros by infinity: what is divided by it becomes zero."""
    return torch.where(values == 0, torch.inf, values)
