"""How far a model's answers are from the original's, on texts that were cut once.

The figure is the Kullback-Leibler divergence of next-token distributions, nats a token, over the whole vocabulary and from
float32 logits. Every window gives one mean; intervals and comparisons are over windows, which all models share.
"""

import hashlib
import inspect
import math
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from poise.calibration.text import Text
from poise.checkpoints import open_checkpoint
from poise.engines.torch import Torch

LENGTH = 512
DRAWS = 2000


def halves(text: str) -> tuple[str, str]:
    """Cut at the beginning of an article, or of a paragraph, near the middle."""
    mark = "\n = " if "\n = " in text else "\n\n"
    cut = text.rfind(mark, 0, len(text) // 2)
    return text[:cut], text[cut:]


def docstrings() -> str:
    """Technical prose that comes with pinned packages."""
    import numpy

    def of(module: Any, prefix: str) -> Iterator[str]:
        for name, item in sorted(vars(module).items()):
            if not name.startswith("_") and callable(item) and (text := inspect.getdoc(item)):
                yield f"{prefix}.{name}\n{text}"

    parts = [*of(torch.nn, "torch.nn"), *of(torch.optim, "torch.optim"), *of(numpy, "numpy")]
    return "\n\n".join(part for part in parts if len(part) > 400)


class Judge:
    """Compares models with the original; the original's answers are computed once and kept on disk as float32.

    Args:
        original: folder or file of the original.
        texts: by the name of their rows.
        count: windows of each text.
        work: folder for the original's answers, about 100 MB a window.
    """

    def __init__(self, original: Path, texts: dict[str, str], count: int, work: Path) -> None:
        checkpoint = open_checkpoint(original)
        tokenizer = checkpoint.tokenizer()
        self.windows = {
            name: Text(name=name, content=text).windows(tokenizer, LENGTH, count)
            for name, text in texts.items()
        }
        self.work = work
        work.mkdir(parents=True, exist_ok=True)
        self.salt = checkpoint.fingerprint()
        missing = [
            window for each in self.windows.values() for window in each if not self._file(window).exists()
        ]
        if missing:
            with Torch() as engine:
                engine.load(checkpoint)
                for window in missing:
                    self._keep(window, torch.log_softmax(engine.logits(window), -1))

    def _file(self, window: list[int]) -> Path:
        key = hashlib.sha256(f"{self.salt} {window}".encode()).hexdigest()[:16]
        return self.work / f"answers-{key}.safetensors"

    def _keep(self, window: list[int], answers: torch.Tensor) -> None:
        """A killed run leaves no half file: it is renamed when whole."""
        part = self._file(window).with_suffix(".part")
        save_file({"answers": answers.contiguous()}, part)
        part.replace(self._file(window))

    def judge(self, model: Path) -> dict[str, dict[str, Any]]:
        """Divergence with half its 95 % interval, perplexities and agreement on the likeliest token, for each text."""
        found: dict[str, dict[str, Any]] = {}
        with Torch() as engine:
            engine.load(open_checkpoint(model))
            for name, windows in self.windows.items():
                rows = [self._window(engine, window) for window in windows]
                lost, original, own, agree = zip(*rows, strict=True)
                found[name] = {
                    "kl": statistics.fmean(lost),
                    "half": half_interval(lost),
                    "perplexity": math.exp(statistics.fmean(own)),
                    "perplexity_original": math.exp(statistics.fmean(original)),
                    "perplexity_ratio": math.exp(statistics.fmean(own) - statistics.fmean(original)),
                    "top1": statistics.fmean(agree),
                    "windows": len(lost),
                    "each": [round(one, 6) for one in lost],
                }
        return found

    def _window(self, engine: Torch, window: list[int]) -> tuple[float, float, float, float]:
        wanted = load_file(self._file(window))["answers"]
        return compare(wanted, torch.log_softmax(engine.logits(window), -1), window)


def compare(wanted: torch.Tensor, got: torch.Tensor, window: list[int]) -> tuple[float, float, float, float]:
    """Means over the positions that predict a token of the window.

    Args:
        wanted: the original's log-probabilities, float32 [tokens, vocabulary].
        got: the candidate's.
        window: the tokens.

    Returns:
        Divergence, loss of the original, loss of the candidate (nats a token), agreement on the likeliest token.
    """
    wanted, got = wanted[:-1], got[:-1]
    truth = torch.tensor(window[1:]).unsqueeze(1)
    lost = (wanted.exp() * (wanted - got)).sum(-1).mean()
    agree = (wanted.argmax(-1) == got.argmax(-1)).float().mean()
    return (
        float(lost),
        -float(wanted.gather(1, truth).mean()),
        -float(got.gather(1, truth).mean()),
        float(agree),
    )


def half_interval(values: tuple[float, ...]) -> float:
    """Half of the 95 % interval of a mean, by Student's t; NaN for one value.

    The quantile is the expansion in powers of 1 / (n - 1) by Cornish and Fisher: 2.068 for n = 24, where tables say 2.069.
    """
    if len(values) < 2:
        return math.nan
    z, free = statistics.NormalDist().inv_cdf(0.975), len(values) - 1
    quantile = z + (z**3 + z) / (4 * free) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * free**2)
    return quantile * statistics.stdev(values) / math.sqrt(len(values))


def ratio(own: list[float], other: list[float]) -> tuple[float, float, float]:
    """Mean over mean of the same windows, with its 95 % interval: windows are drawn again, both models' together."""
    ours, theirs = torch.tensor(own), torch.tensor(other)
    draws = torch.randint(len(own), (DRAWS, len(own)), generator=torch.Generator().manual_seed(0))
    drawn = (ours[draws].mean(-1) / theirs[draws].mean(-1)).sort().values
    low, high = (float(drawn[round(share * (DRAWS - 1))]) for share in (0.025, 0.975))
    return float(ours.mean() / theirs.mean()), low, high
