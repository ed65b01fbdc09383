"""What scoring adds to reading: time over the two models' own forward passes, and memory with longer text.

    python benchmarks/scoring.py [--windows 6] [--rounds 3]

SmolLM2-135M-Instruct against itself, windows of 512 tokens. Rounds take turns: both models read all windows, then both read and are scored.
Memory is the peak of fresh processes that score a text and one eight times as long.
"""

import argparse
import subprocess
import sys
import time
from statistics import median

from decoding import default_model
from judging import docstrings
from poise.calibration.text import Text
from poise.checkpoints import open_checkpoint
from poise.core.run import peak_memory
from poise.engines.torch import Torch
from poise.pipeline.cache import Cache
from poise.pipeline.progress import silent
from poise.pipeline.samples import PROTOCOLS, Window, read_windows
from poise.pipeline.scoring import Lazy, score_pair


def engine() -> Torch:
    """A model that is loaded."""
    found = Torch()
    found.load(open_checkpoint(default_model()))
    return found


def cut(count: int) -> list[Window]:
    """Windows of technical prose, repeated if there are too few."""
    text = Text(name="docstrings", content=docstrings())
    found = read_windows([text], open_checkpoint(default_model()).tokenizer(), PROTOCOLS["windows"], count)
    return (found * (count // len(found) + 1))[:count]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--windows", type=int, default=6)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--memory", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    models = [Lazy(engine), Lazy(engine)]
    if arguments.memory:
        score_pair(*models, cut(arguments.memory), Cache(None, {"n": 0}), silent)
        print(peak_memory())
        return
    windows = cut(arguments.windows)
    reading, scoring = [], []
    for number in range(arguments.rounds + 1):
        start = time.perf_counter()
        for window in windows:
            for model in models:
                model.engine.logits(list(window.tokens))
        middle = time.perf_counter()
        score_pair(*models, windows, Cache(None, {"n": number}), silent)
        if number:
            reading.append(middle - start)
            scoring.append(time.perf_counter() - middle)
    share = median(b / a for a, b in zip(reading, scoring, strict=True)) - 1
    print(f"reading {median(reading):.2f} s, with scores {median(scoring):.2f} s: {share:+.1%} (bar 15 %)")
    peaks = [
        int(
            subprocess.run(
                [sys.executable, __file__, "--memory", str(n)], check=True, capture_output=True
            ).stdout
        )
        for n in (arguments.windows, 8 * arguments.windows)
    ]
    print(f"peak memory {peaks[0] / 1e6:.0f} MB, with eight times the text {peaks[1] / 1e6:.0f} MB")
    if share > 0.15:
        sys.exit("scoring adds more than 15 %")


if __name__ == "__main__":
    main()
