"""Presets: one wish for all linears of the stack, by what it may cost.

    fast       no data of yours: error feedback with a thousand tokens of the short built-in text, hardly believed. Seconds.
    balanced   the same under the Hessian of more text, then coordinate descent. Minutes.
    best       the same on more text, then scales and norms are tuned to the original's answers, and codes where levels are few.
               Up to hours.

The embedding, the head and routers are left alone.
"""

from dataclasses import dataclass

from poise.core.errors import UsageError
from poise.core.plan import Option, Recipe, Rule

FEW = 2
"""Bits up to which codes are worth training. Among more levels the gradient of a single code is lost in noise: after hundreds of
steps a thousandth of them had moved, by chance (docs/lab.md)."""


@dataclass(frozen=True, kw_only=True)
class Preset:
    """How the linears are solved.

    Attributes:
        solver: spec of the solver, or of a chain.
        tokens: of calibration text.
        tune: spec of what follows after all layers, or None.
        few: instead of it where levels are few; None if nothing changes.
        cost: for people.
    """

    solver: str
    tokens: int
    tune: str | None
    cost: str
    few: str | None = None

    def tuning(self, bits: int) -> str | None:
        """Spec of what follows after all layers of so many bits."""
        return self.few if self.few is not None and bits <= FEW else self.tune


PRESETS = {
    "fast": Preset(
        solver="gptq(damp=0.5)",
        tokens=1024,
        tune=None,
        cost="seconds for a model of 100 million weights; no text of yours",
    ),
    "balanced": Preset(
        solver="gptaq(groups='twice', damp=0.2) -> refine(damp=0.2)",
        tokens=32768,
        tune=None,
        cost="minutes for a model of 100 million weights; memory of one block",
    ),
    "best": Preset(
        solver="gptaq(groups='twice', damp=0.2) -> refine(damp=0.2)",
        tokens=131072,
        tune="distill(steps=260, batch=1024, hidden=5.0)",
        few="distill(steps=150, code_rate=0.004, hidden=5.0, reads=2)",
        cost="up to hours for a model of 100 million weights; memory of the whole model",
    ),
}

BLOCKS = {4: ("q4_k", "q4_1"), 3: ("q3_k",), 2: ("q2_k", "q2_0")}
"""Types of llama.cpp near a number of bits, for containers that hold no other integers."""


def preset_recipe(name: str, bits: int = 4, group: int = 64) -> Recipe:
    """The recipe of a preset: asymmetric integers; where the container has none, its own blocks of as many bits.

    Raises:
        UsageError: no such preset, or bits and group that are no integers.
    """
    if name not in PRESETS:
        raise UsageError(f"no preset {name!r}: there is {', '.join(PRESETS)}")
    preset = PRESETS[name]
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
        tune=preset.tuning(bits),
        tokens=preset.tokens,
    )
