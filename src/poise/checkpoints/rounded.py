"""A checkpoint whose matrices are rounded to nearest as they are read: a model that is known to be damaged."""

from torch import Tensor

from poise.checkpoints.rewritten import Rewritten
from poise.core.checkpoint import Checkpoint
from poise.core.format import Format
from poise.core.registry import build
from poise.core.solver import Solver


class Rounded(Rewritten):
    """All matrices of the blocks, in one format.

    Args:
        inner: the checkpoint behind it.
        format: spec of a number format.
    """

    def __init__(self, inner: Checkpoint, format: str) -> None:
        super().__init__(inner, ())
        self.format: Format = build("format", format)
        self.solver: Solver = build("solver", "rtn")
        blocks = [linear for linear in inner.linears() if linear.block is not None]
        self.of = {linear.name: [] for linear in blocks if linear.role != "router"}

    def _through(self, name: str, matrix: Tensor) -> Tensor:
        return self.solver.solve(matrix.float(), self.format, name=name).decode()

    def fingerprint(self) -> str:
        return f"{self.inner.fingerprint()}, {self.format}"
