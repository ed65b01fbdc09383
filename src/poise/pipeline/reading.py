"""What a model reads for a plan: how much text, in windows of which length."""

from poise.calibration.text import Text
from poise.core.checkpoint import Checkpoint
from poise.core.plan import Plan
from poise.core.registry import build
from poise.pipeline.stream import Calibration

DIAGONAL_WINDOW = 256
"""Tokens of a window of calibration text, where only second moments are wanted."""

HESSIAN_WINDOW = 512
"""Likewise for Hessians."""

DIAGONAL_TOKENS = 2500
"""Tokens that second moments need."""

HESSIAN_TOKENS = 16384
"""Tokens that Hessians need."""


def read_windows(checkpoint: Checkpoint, plan: Plan, text: Text) -> Calibration | None:
    """What the model reads, if a planned solver uses statistics or something is trained."""
    if not wants_stats(plan) and plan.tune is None:
        return None
    length = HESSIAN_WINDOW if wants_hessian(plan) else DIAGONAL_WINDOW
    length = min(length, checkpoint.context or length)
    windows = text.windows(checkpoint.tokenizer(), length, limit=max(1, tokens_of(plan) // length))
    return Calibration(windows=windows, hash=text.hash)


def tokens_of(plan: Plan) -> int:
    """Tokens that are read, if the text has as many."""
    return plan.tokens or (HESSIAN_TOKENS if wants_hessian(plan) else DIAGONAL_TOKENS)


def wants_hessian(plan: Plan) -> bool:
    """Whether a planned solver uses products of inputs."""
    return any("hessian" in build("solver", str(row.solver)).wants for row in plan.quantized)


def wants_stats(plan: Plan) -> bool:
    """Whether a planned solver uses any statistics."""
    return any(build("solver", str(row.solver)).wants for row in plan.quantized)
