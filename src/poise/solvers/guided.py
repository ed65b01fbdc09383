"""Error feedback under Hessians that weigh every token by what the layer's outputs matter to the loss there."""

from dataclasses import dataclass
from typing import ClassVar

from poise.core.errors import UsageError
from poise.solvers.gptaq import Gptaq


@dataclass(frozen=True, kw_only=True)
class Guided(Gptaq):
    """As ``gptaq``, with H_k = E[s_k x x^T] for each of ``runs`` equal runs of rows, s_k(t) the mean over the run's outputs
    of the squared gradient of the loss at token t (Kim et al. 2025, GuidedQuant, arXiv 2505.07004, equation 7).

    Deviations: the loss is the cross-entropy of tokens drawn from the original's own distribution, so that H is the
    Fisher information and text needs no right answers; s is divided by its mean; the cross moment is weighed alike.

    Attributes:
        runs: of rows that share a Hessian.
    """

    needs: ClassVar[frozenset[str]] = Gptaq.needs | {"gradient"}

    runs: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.runs < 1:
            raise UsageError(f"runs is at least 1, got {self.runs}")
