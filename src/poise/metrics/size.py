"""What a model takes on disk, from its bytes."""

from typing import ClassVar

from poise.core.metric import Score, Subject, SystemMetric


class Size(SystemMetric):
    """Bytes of all tensors with their metadata, and bits a weight."""

    unit: ClassVar[str] = "bytes"
    protocol: ClassVar[str] = "bytes of all tensors in the files, scales and padding included"

    def measure(self, subjects: list[Subject]) -> list[list[Score]]:
        return [self._measure(subject) for subject in subjects]

    def _measure(self, subject: Subject) -> list[Score]:
        infos = subject.checkpoint.tensors().values()
        stored = sum(info.nbytes for info in infos)
        weights = sum(info.numel for info in infos)
        return [
            Score(name="size", value=float(stored), unit="bytes", protocol=self.protocol),
            Score(name="bits_per_weight", value=8 * stored / weights, unit="bits", protocol=self.protocol),
        ]
