"""What the presets cost and lose: SmolLM2-135M-Instruct, all linears, groups of 64: docs/quality.json.

    python benchmarks/quality.py --text FILE [--bits 4 3 2] [--presets fast balanced best] [--windows 24]

FILE is a development text such as the validation split of WikiText-2. Its first half calibrates, on its second half the
models are judged, and on a second domain that nothing was calibrated on: docstrings of torch and numpy. The figure is the
Kullback-Leibler divergence of next-token distributions from the original's, nats a token, over the whole vocabulary, with
a 95 % interval over windows of 512 tokens. Rows that were measured before are kept in build/quality/results.jsonl.
"""

import argparse
import inspect
import json
import math
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from decoding import default_model
from poise.calibration.text import Text
from poise.checkpoints import open_checkpoint
from poise.core.run import versions
from poise.engines.torch import Torch

WORK = Path("build/quality")
OUT = Path(__file__).parents[1] / "docs" / "quality.json"
BARS = {("balanced", 4): 0.065, ("balanced", 3): 0.25, ("balanced", 2): 0.90} | {
    ("best", 4): 0.045,
    ("best", 3): 0.15,
    ("best", 2): 0.45,
}
LENGTH = 512
STUDENT = 2.07
"""97.5 % quantile of Student's t with 23 degrees of freedom."""


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
    """Compares models with the original on texts that were cut once.

    Args:
        count: windows of each text.
    """

    def __init__(self, original: Path, texts: dict[str, str], count: int) -> None:
        checkpoint = open_checkpoint(original)
        tokenizer = checkpoint.tokenizer()
        self.windows = {
            name: Text(name=name, content=text).windows(tokenizer, LENGTH, count)
            for name, text in texts.items()
        }
        with Torch() as engine:
            engine.load(checkpoint)
            self.wanted = {
                name: [torch.log_softmax(engine.logits(window), -1) for window in windows]
                for name, windows in self.windows.items()
            }

    def judge(self, model: Path) -> dict[str, dict[str, float]]:
        """Divergence with half its interval, perplexity ratio and agreement on the likeliest token, for each text."""
        found = {}
        with Torch() as engine:
            engine.load(open_checkpoint(model))
            for name, windows in self.windows.items():
                rows = [self._window(engine, *pair) for pair in zip(windows, self.wanted[name], strict=True)]
                lost, ratio, agree = zip(*rows, strict=True)
                half = STUDENT * statistics.stdev(lost) / math.sqrt(len(lost)) if len(lost) > 1 else math.nan
                found[name] = {
                    "kl": statistics.fmean(lost),
                    "half": half,
                    "perplexity_ratio": math.exp(statistics.fmean(ratio)),
                    "top1": statistics.fmean(agree),
                    "windows": len(lost),
                }
        return found

    @staticmethod
    def _window(engine: Torch, window: list[int], wanted: torch.Tensor) -> tuple[float, float, float]:
        got = torch.log_softmax(engine.logits(window), -1)
        lost = (wanted.exp() * (wanted - got)).sum(-1)[:-1].mean()
        truth = torch.tensor(window[1:]).unsqueeze(1)
        ratio = (wanted[:-1].gather(1, truth) - got[:-1].gather(1, truth)).mean()
        agree = (wanted.argmax(-1) == got.argmax(-1))[:-1].float().mean()
        return float(lost), float(ratio), float(agree)


def quantize(original: Path, preset: str, bits: int, calibration: Path) -> tuple[Path, float, float]:
    """The exported model, seconds of the whole command, and bits a weight of its linears."""
    out = WORK / f"{preset}-{bits}"
    command = ["quantize", str(original), "--preset", preset, "--bits", str(bits), "--group", "64"]
    command += [
        "--calibration",
        str(calibration),
        "--to",
        "compressed-tensors",
        "-o",
        str(out),
        "--force",
        "--json",
    ]
    start = time.perf_counter()
    done = subprocess.run([sys.executable, "-m", "poise", *command], check=True, stdout=subprocess.PIPE)
    seconds = time.perf_counter() - start
    (artifact,) = json.loads(done.stdout)["artifacts"]
    return Path(artifact["model"]), seconds, artifact["manifest"]["linear_bits_per_weight"]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--text", type=Path, required=True, help="development text, UTF-8")
    parser.add_argument("--bits", type=int, nargs="+", default=[4, 3, 2])
    parser.add_argument("--presets", nargs="+", default=["fast", "balanced", "best"])
    parser.add_argument("--windows", type=int, default=24)
    parser.add_argument("--again", action="store_true", help="measure rows that were measured before")
    arguments = parser.parse_args()
    WORK.mkdir(parents=True, exist_ok=True)
    first, second = halves(arguments.text.read_text(encoding="utf-8"))
    calibration = WORK / "calibration.txt"
    calibration.write_text(first, encoding="utf-8")
    results = WORK / "results.jsonl"
    rows = [json.loads(line) for line in results.read_text().splitlines()] if results.exists() else []
    judge: Judge | None = None
    for bits in arguments.bits:
        for preset in arguments.presets:
            if not arguments.again and any((row["preset"], row["bits"]) == (preset, bits) for row in rows):
                continue
            texts = {"held-out": second, "docstrings": docstrings()}
            judge = judge or Judge(default_model(), texts, arguments.windows)
            model, seconds, stored = quantize(default_model(), preset, bits, calibration)
            row = {"preset": preset, "bits": bits, "stored": stored, "seconds": seconds, **judge.judge(model)}
            rows = [old for old in rows if (old["preset"], old["bits"]) != (preset, bits)] + [row]
            with open(results, "a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
    rows.sort(key=lambda row: (-row["bits"], row["seconds"]))
    OUT.write_text(json.dumps({"versions": versions(), "rows": rows}, indent=1) + "\n", encoding="utf-8")
    show(rows)


def show(rows: list[dict[str, Any]]) -> None:
    table = Table("preset", "bits", "stored", "seconds", "KL held-out", "bar", "top-1", "KL docstrings")
    for row in rows:
        held, other = row["held-out"], row["docstrings"]
        bar = BARS.get((row["preset"], row["bits"]))
        said = "" if bar is None else f"{bar} {'reached' if held['kl'] <= bar else 'MISSED'}"
        table.add_row(
            row["preset"],
            str(row["bits"]),
            f"{row['stored']:.2f}",
            f"{row['seconds']:.0f}",
            f"{held['kl']:.4f} ± {held['half']:.4f}",
            said,
            f"{held['top1']:.3f}",
            f"{other['kl']:.4f} ± {other['half']:.4f}",
        )
    Console().print(table)


if __name__ == "__main__":
    main()
