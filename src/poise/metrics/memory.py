"""Peak memory of a model in a fresh process."""

import json
import math
import subprocess
from typing import ClassVar

from poise.core.metric import Score, Subject, SystemMetric


class Memory(SystemMetric):
    """Largest resident set while a model is loaded and reads 64 tokens, less what the interpreter and its
    libraries held before. A fresh process each, so that nothing else is counted."""

    unit: ClassVar[str] = "bytes"
    protocol: ClassVar[str] = "peak resident set of a fresh process, less the set before loading; 64 tokens"

    def measure(self, subjects: list[Subject]) -> list[list[Score]]:
        return [self._measure(subject) for subject in subjects]

    def _measure(self, subject: Subject) -> list[Score]:
        value = _taken(subprocess.run(subject.probe, capture_output=True, text=True))
        failed = int(math.isnan(value))
        return [
            Score(
                name="memory",
                value=value,
                unit="bytes",
                protocol=f"{self.protocol}, engine {subject.engine}",
                n=1 - failed,
                n_unscored=failed,
            )
        ]


def _taken(done: subprocess.CompletedProcess[str]) -> float:
    """Bytes by the last line that a probe printed; NaN when it failed or printed something else."""
    try:
        memory = json.loads(done.stdout.splitlines()[-1])
        return math.nan if done.returncode else float(memory["peak"] - memory["before"])
    except (ValueError, LookupError, TypeError):
        return math.nan
