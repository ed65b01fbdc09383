"""What a number format costs and loses, measured on random weights."""

import math
from collections.abc import Callable, Iterable
from functools import cache

import torch
from torch import Tensor

from poise.core.format import Format, FormatFacts
from poise.core.registry import build, name_of, spec_of
from poise.planning.grid import LAYER, answers

SHAPE = (32, 4096)
"""Rows as long as those that bits are counted for: levels of a whole row adapt to a short one."""
SMALL = (16, 1024)
"""Sample of formats that round a long run of columns: a few ten thousand weights a second."""
LONG = 16
"""Columns rounded together from which the small sample is taken."""
LARGE = (512, 1024)
"""Sample of formats with codebooks or factors that all rows share, which would learn a few rows by heart."""

Progress = Callable[[str, int, int], None]


def examine(
    specs: Iterable[str], *, measure: bool = True, progress: Progress | None = None
) -> list[FormatFacts]:
    """The facts of every spec, in order.

    Raises:
        UsageError: no such format, or arguments that it does not take.
    """
    wanted = [(spec, build("format", spec).resolve("float16")) for spec in specs]
    rows = []
    for number, (spec, format) in enumerate(wanted):
        if progress:
            progress(f"measure {spec}", number, len(wanted))
        rows.append(
            FormatFacts(
                spec=spec,
                name=name_of(format),
                bits_per_weight=format.bits_per_weight(*LAYER.shape),
                group=format.group_of(LAYER.columns),
                width=format.width,
                gaussian=signal_to_noise(format, "gaussian") if measure else None,
                heavy=signal_to_noise(format, "heavy") if measure else None,
                exporters=answers(spec_of(build("format", spec))),
            )
        )
    return rows


def signal_to_noise(format: Format, kind: str) -> float:
    """10 log10(sum w^2 / sum (w - w')^2), infinite for a format that is exact."""
    long, joint = format.width >= LONG, format.shared and format.width != 1
    weight = sample(kind, *(SMALL if long else LARGE if joint else SHAPE))
    error = float((build("solver", "search").solve(weight, format).decode() - weight).square().sum())
    return 10 * math.log10(float(weight.square().sum()) / error) if error else math.inf


@cache
def sample(kind: str, rows: int, columns: int) -> Tensor:
    """Random weights of variance about one, always the same: ``gaussian`` or ``heavy``."""
    generator = torch.Generator().manual_seed(0)
    normal = torch.randn(rows, columns, generator=generator)
    if kind == "gaussian":
        return normal
    chi = torch.randn(5, rows, columns, generator=generator).square().sum(0)
    return normal / (chi / 5).sqrt()
