"""KL divergence from the reference's next-token distribution to the candidate's."""

from typing import ClassVar

from torch import Tensor
from torch.nn.functional import kl_div, log_softmax

from poise.core.metric import LogitMetric


class Kl(LogitMetric):
    """KL(P_reference || P_candidate) in nats, mean over positions, over the full vocabulary."""

    unit: ClassVar[str] = "nats"
    protocol: ClassVar[str] = "KL(reference || candidate), full vocabulary, mean over positions"

    def sample(self, reference: Tensor, candidate: Tensor, tokens: Tensor) -> float:
        p, q = log_softmax(reference, -1), log_softmax(candidate, -1)
        return float(kl_div(q, p, reduction="none", log_target=True).sum(-1).mean())
