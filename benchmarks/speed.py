"""Speed of rtn to 4-bit groups, beside a plain torch one-liner and the byte copy of the same file.

    python benchmarks/speed.py [--layers 2] [--rounds 5]

Bar: 150 MB of bf16 input a second on two cores. All three run in turn in one process, round by round, so
that a machine that slows down slows all of them. Medians, and ratios of them. ``poise quantize`` from
file to file, with reading back and hashing, is timed once more at the end in a process of its own.
"""

import argparse
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

from poise.checkpoints import open_checkpoint
from poise.core.registry import build
from synthetic import make_checkpoint

GROUP = 32


def one_liner(weight: torch.Tensor) -> torch.Tensor:
    """What people write: symmetric 4-bit groups, scale from the largest magnitude, no packing."""
    grouped = weight.float().view(-1, GROUP)
    scale = grouped.abs().amax(-1, keepdim=True) / 7
    return (grouped / scale).round().clamp(-8, 7).to(torch.int8)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    work = Path(tempfile.mkdtemp())
    try:
        measure(make_checkpoint(work / "source", arguments.layers), work, arguments.rounds)
    finally:
        shutil.rmtree(work)


def measure(source: Path, work: Path, rounds: int) -> None:
    checkpoint = open_checkpoint(source)
    linears = [linear for linear in checkpoint.linears() if linear.role != "embedding"]
    solver, format = build("solver", "rtn"), build("format", f"int(bits=4, group={GROUP}, scale='bfloat16')")
    nbytes = sum(2 * linear.numel for linear in linears)

    def poise() -> None:
        for linear in linears:
            solver.solve(checkpoint.read_matrix(linear), format).pack()

    def plain() -> None:
        for linear in linears:
            one_liner(checkpoint.read_matrix(linear))

    def copy() -> None:
        for linear in linears:
            checkpoint.read_matrix(linear).clone()

    ways: dict[str, Callable[[], None]] = {
        "poise rtn, read, solve and pack": poise,
        "torch one-liner, read and round": plain,
        "copy, read and clone": copy,
    }
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds + 1):
        for name, way in ways.items():
            start = time.perf_counter()
            way()
            seconds[name].append(time.perf_counter() - start)
    base = statistics.median(seconds["poise rtn, read, solve and pack"][1:])
    print(
        f"{nbytes / 1e6:.0f} MB of bf16 weights, {torch.get_num_threads()} threads, {rounds} rounds, medians"
    )
    for name, values in seconds.items():
        middle = statistics.median(values[1:])
        print(f"{name:<34}{nbytes / middle / 1e6:>8.0f} MB/s{base / middle:>8.2f}x poise")
    whole_run(source, work)


def whole_run(source: Path, work: Path) -> None:
    """The command from file to file: start-up, embedding, export, reading back and hashing included."""
    nbytes = sum(file.stat().st_size for file in source.glob("*.safetensors"))
    recipe = Path(__file__).parent / "rtn4.yaml"
    for exporter in ("compressed-tensors", "gguf"):
        start = time.perf_counter()
        command = [sys.executable, "-m", "poise", "quantize", str(source), "--recipe", str(recipe)]
        subprocess.run(
            [*command, "--to", exporter, "-o", str(work / exporter)], check=True, stdout=subprocess.DEVNULL
        )
        rate = nbytes / (time.perf_counter() - start) / 1e6
        print(f"poise quantize --to {exporter:<20} {rate:>6.0f} MB/s of {nbytes / 1e6:.0f} MB, file to file")


if __name__ == "__main__":
    main()
