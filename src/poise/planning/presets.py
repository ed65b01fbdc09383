"""Presets: one wish for all linears of the stack, by what it may cost.

    fast       no data of yours: error feedback with half of the short built-in text, hardly believed. Seconds.
    balanced   channels equalized, the same under the Hessian of more text, then coordinate descent. Minutes. Where levels are few and
               time is left, small models are tuned for a moment, as in best.
    best       the same on more text, then scales and norms are tuned to the original's answers, and codes where levels are few.
               Up to hours.

The embedding, the head and routers are left alone. A preset is a promise of time: a processor that multiplies bfloat16 reads more
text in it and trains longer. What a run did stands in its plan, and a recipe asks for it anywhere.
"""

from dataclasses import dataclass, replace

import torch

from poise.core.errors import UsageError
from poise.core.plan import Option, Recipe, Rule
from poise.core.precision import product_dtype

FEW = 2
"""Bits up to which codes are worth training. Among more levels the gradient of a single code is lost in noise: after hundreds of
steps a thousandth of them had moved, by chance (docs/lab.md)."""
SMALL = 200_000_000
"""Weights up to which a preset of minutes trains where levels are few: training takes some 40 bytes for each."""


@dataclass(frozen=True, kw_only=True)
class Preset:
    """How the linears are solved.

    Attributes:
        solver: spec of the solver, or of a chain.
        tokens: of calibration text.
        transforms: specs of what is done to weights before.
        tune: spec of what follows after all layers, or None.
        tune_up_to: as in a recipe.
        few: the preset that it is where levels are few; None if it stays the same.
        cost: for people.
    """

    solver: str
    tokens: int
    cost: str
    transforms: tuple[str, ...] = ()
    tune: str | None = None
    tune_up_to: int | None = None
    few: "Preset | None" = None

    def at(self, bits: int) -> "Preset":
        """What it is for so many bits."""
        return self.few if self.few is not None and bits <= FEW else self


FAST = Preset(
    solver="gptq(damp=0.3)",
    tokens=1024,
    cost="seconds for a model of 100 million weights; no text of yours",
)
BALANCED = Preset(
    solver="gptaq(groups='twice', damp=0.2) -> refine(damp=0.2)",
    transforms=("equalize",),
    tokens=28672,
    cost="minutes for a model of 100 million weights; memory of one block",
)
BEST = replace(
    BALANCED,
    tokens=131072,
    tune="distill(steps=260, batch=1024, hidden=5.0)",
    cost="up to hours for a model of 100 million weights; memory of the whole model",
)

PRESETS = {
    "fast": FAST,
    "balanced": BALANCED,
    "best": replace(BEST, few=replace(BEST, tune="distill(steps=150, code_rate=0.004, hidden=5.0, reads=2)")),
}

QUICK = {
    "balanced": replace(
        BALANCED,
        tokens=98304,
        few=replace(
            BALANCED,
            tokens=57344,
            tune="distill(steps=88, batch=1024, code_rate=0.008, hidden=5.0)",
            tune_up_to=SMALL,
            cost="minutes for a model of 100 million weights; memory of one block, or of a small model as a whole",
        ),
    ),
    "best": replace(
        BEST,
        tokens=262144,
        tune="distill(steps=667, hidden=5.0, reads=5)",
        few=replace(BEST, tokens=262144, tune="distill(steps=700, code_rate=0.004, hidden=5.0, reads=6)"),
    ),
}
"""What presets are instead where processors multiply bfloat16: as much as the same time holds there."""

BLOCKS = {4: ("q4_k", "q4_1"), 3: ("q3_k",), 2: ("q2_k", "q2_0")}
"""Types of llama.cpp near a number of bits, for containers that hold no other integers."""


def preset_of(name: str, quick: bool) -> Preset:
    """What a name stands for, on processors that multiply bfloat16 or on others.

    Raises:
        UsageError: no such preset.
    """
    if name not in PRESETS:
        raise UsageError(f"no preset {name!r}: there is {', '.join(PRESETS)}")
    return QUICK.get(name, PRESETS[name]) if quick else PRESETS[name]


def preset_recipe(name: str, bits: int = 4, group: int = 64, quick: bool | None = None) -> Recipe:
    """The recipe of a preset: asymmetric integers; where the container has none, its own blocks of as many bits.

    Args:
        quick: whether for processors that multiply bfloat16; None asks this one.

    Raises:
        UsageError: no such preset, or bits and group that are no integers.
    """
    preset = preset_of(name, product_dtype() == torch.bfloat16 if quick is None else quick).at(bits)
    options = [
        f"int(bits={bits}, group={group}, symmetric=False)",
        f"int(bits={bits}, group={group}, symmetric=False, zero='minimum')",
        *(
            f"int(bits={bits}, group={smaller}, symmetric=False)"
            for smaller in (64, 32, 16)
            if smaller < group
        ),
        f"int(bits={bits}, group={group})",
        *BLOCKS.get(bits, ()),
    ]
    keep = [Rule(role=role, options=(), optional=True) for role in ("router", "head", "embedding")]
    rule = Rule(options=tuple(Option(format=option) for option in options), solver=preset.solver)
    return Recipe(
        name=f"{name}-{bits}bit",
        description=f"{bits}-bit integers in groups of {group}; {preset.cost}",
        rules=(*keep, rule),
        transforms=preset.transforms,
        tune=preset.tune,
        tune_up_to=preset.tune_up_to,
        tokens=preset.tokens,
    )
