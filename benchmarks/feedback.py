"""Error feedback for one matrix: Poise beside the routines of GPTQModel and llm-compressor, on the same weights and inputs.

    bash benchmarks/peers/install.sh gptqmodel llmcompressor
    python benchmarks/feedback.py [--size 4096] [--group 128] [--bits 4] [--rounds 3]

Bars: under 20 seconds for 4096 x 4096 in groups of 128 on two cores, and at least twice as fast as either routine. Every
run is a process of its own, and they take turns. What is timed: ranges and error feedback, from a Hessian that is there,
the second time in the process: models have hundreds of matrices. The error is that of the outputs, as a share of their
square.

Weights are normal with heavier rows; inputs have columns of very different sizes and share half of their variance in 64
directions, so that the order of columns and the off-diagonal matter.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from safetensors.torch import load_file, save_file

HERE = Path(__file__).resolve().parent
PEERS = ("gptqmodel", "llmcompressor")
OURS = ("gptq", "gptaq", "gptq -> refine")
BAR, TIMES = 20.0, 2.0


def make_case(size: int, tokens: int) -> dict[str, torch.Tensor]:
    """Weights [size, size] and inputs [tokens, size]."""
    dice = torch.Generator().manual_seed(0)
    weight = torch.randn(size, size, generator=dice) * 0.02
    weight *= torch.exp(0.3 * torch.randn(size, 1, generator=dice))
    shared = torch.randn(tokens, 64, generator=dice) @ torch.randn(64, size, generator=dice) / 8
    inputs = shared + torch.randn(tokens, size, generator=dice)
    return {"weight": weight, "inputs": inputs * torch.exp(torch.randn(size, generator=dice))}


def solve(solver: str, file: Path, out: Path, bits: int, group: int) -> None:
    """One solver of ours, in this process; prints its seconds."""
    from poise.core.registry import build
    from poise.core.stats import Stats

    given = load_file(file)
    format = build("format", f"int(bits={bits}, group={group}, symmetric=False)")

    hessian = given["inputs"].T @ given["inputs"] / len(given["inputs"])
    for _ in range(2):
        known = Stats(
            second_moment=hessian.diagonal().clone(),
            n_tokens=len(given["inputs"]),
            data_hash="",
            hessian=hessian,
            cross=hessian.clone(),
        )
        start = time.perf_counter()
        found = build("solver", solver).solve(given["weight"], format, known)
        seconds = time.perf_counter() - start
    save_file({"weight": found.decode()}, out)
    print(json.dumps({"seconds": seconds}))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", type=int, default=4096)
    parser.add_argument("--group", type=int, default=128)
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--solver", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.solver:
        files = arguments.folder / "case.safetensors", arguments.folder / "out.safetensors"
        solve(arguments.solver, *files, arguments.bits, arguments.group)
        return
    wish = ["--bits", str(arguments.bits), "--group", str(arguments.group)]
    seconds: dict[str, list[float]] = {}
    errors: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as folder:
        file, out = Path(folder) / "case.safetensors", Path(folder) / "out.safetensors"
        case = make_case(arguments.size, arguments.tokens)
        save_file(case, file)
        wanted = (case["inputs"] @ case["weight"].T).square().sum()
        for _ in range(arguments.rounds):
            for name in (*OURS, *PEERS):
                if name in PEERS:
                    python = HERE.parent / ".venv-peers" / name / "bin" / "python"
                    if not python.exists():
                        raise SystemExit(f"no {python}: run bash benchmarks/peers/install.sh {name}")
                    command = [str(python), str(HERE / "peers" / "routine.py"), name, str(file), str(out)]
                else:
                    command = [sys.executable, __file__, "--solver", name, "--folder", folder]
                done = subprocess.run([*command, *wish], check=True, stdout=subprocess.PIPE, text=True)
                seconds.setdefault(name, []).append(json.loads(done.stdout.splitlines()[-1])["seconds"])
                lost = case["weight"] - load_file(out)["weight"]
                errors[name] = float((case["inputs"] @ lost.T).square().sum() / wanted)
    table = Table("routine", "seconds (median)", "slowest", *(f"of {name}" for name in PEERS), "output error")
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    for name, values in seconds.items():
        ratios = [f"{medians[name] / medians[peer]:.2f}" for peer in PEERS]
        table.add_row(name, f"{medians[name]:.2f}", f"{max(values):.2f}", *ratios, f"{errors[name]:.3g}")
    Console(width=120).print(table)
    if max(seconds["gptq"]) > BAR or any(medians["gptq"] * TIMES > medians[peer] for peer in PEERS):
        raise SystemExit(
            f"MISSED: gptq is to take at most {BAR:.0f} s and at most 1/{TIMES:.0f} of a peer's time"
        )


if __name__ == "__main__":
    main()
