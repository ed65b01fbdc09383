"""KL divergence from the reference's next-token distribution to the candidate's."""

from typing import ClassVar

import torch
from torch import Tensor

from poise.core.metric import LogitMetric

ROWS = 8
"""Positions at a time: their rows stay in the second-level cache between the steps."""


class Kl(LogitMetric):
    """KL(P_reference || P_candidate) in nats, over the full vocabulary (Kullback and Leibler 1951)."""

    unit: ClassVar[str] = "nats"
    protocol: ClassVar[str] = "KL(reference || candidate), full vocabulary, mean over positions"

    def values(self, reference: Tensor, candidate: Tensor, tokens: Tensor) -> Tensor:
        parts = zip(torch.split(reference, ROWS), torch.split(candidate, ROWS), strict=True)
        found = [torch.linalg.vecdot(p.exp(), _difference(p, q)) for p, q in parts]
        return torch.cat(found)


def _difference(p: Tensor, q: Tensor) -> Tensor:
    """Where the reference gives no probability at all, nothing is lost."""
    return torch.where(p == -torch.inf, 0, p - q)
