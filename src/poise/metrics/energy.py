"""What generating a token takes from the socket of the processor, where it counts that."""

import math
from pathlib import Path
from typing import ClassVar

from poise.core.metric import Score, Subject, SystemMetric

COUNTERS = Path("/sys/class/powercap")
PROMPT = 16
GENERATED = 64


class Energy(SystemMetric):
    """Joules a generated token by the counters of Intel and AMD processors (RAPL), everything else on the machine included. Without
    a counter that may be read there is no figure: nothing is guessed from what a processor may take at most."""

    unit: ClassVar[str] = "joules"
    protocol: ClassVar[str] = f"RAPL packages over {PROMPT} tokens in and {GENERATED} out, whole machine"

    def measure(self, subjects: list[Subject]) -> list[list[Score]]:
        return [[self._measure(subject)] for subject in subjects]

    def _measure(self, subject: Subject) -> Score:
        value = math.nan
        if _joules() is not None:
            with subject.start() as engine:
                prompt = list(range(1, PROMPT + 1))
                engine.generate(prompt, GENERATED)
                before = _joules()
                engine.generate(prompt, GENERATED)
                after = _joules()
            if before is not None and after is not None and after >= before:  # a counter may wrap
                value = (after - before) / GENERATED
        missing = math.isnan(value)
        reason = "; not available: no counter of this machine may be read" if missing else ""
        return Score(
            name="energy_per_token",
            value=value,
            unit="joules",
            protocol=f"{self.protocol}, engine {subject.engine}{reason}",
            n=int(not missing),
            n_unscored=int(missing),
        )


def _joules() -> float | None:
    """Sum over packages; None where there is no counter, or it may not be read."""
    try:
        values = [int((folder / "energy_uj").read_text()) for folder in COUNTERS.glob("intel-rapl:?")]
    except (OSError, ValueError):
        return None
    return sum(values) / 1e6 if values else None
