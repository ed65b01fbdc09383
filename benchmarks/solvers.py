"""What error feedback and coordinate descent gain in every number format: docs/solvers.json.

    python benchmarks/solvers.py [--rows 96] [--model GGUF]

A real weight (SmolLM2, the down projection of block 15: rows of 1536) and the Hessian of what it reads on the built-in
calibration text. The figure is E|(W - W') x|^2 / E|W x|^2. Every format must have gptq below search and refine at or below
gptq, or a reason; the program ends with 1 otherwise.
"""

import argparse
import json
import sys
import time
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from decoding import default_model
from poise.calibration.text import load_text
from poise.checkpoints import open_checkpoint
from poise.core.registry import build, names
from poise.core.stats import Stats
from poise.pipeline.blocks import Blocks
from poise.planning.grid import EXAMPLES

BLOCK, NAME = 15, "model.layers.15.mlp.down_proj.weight"
SOLVERS = ("rtn", "search", "gptq", "gptq -> refine")
EXCEPT = {"float(dtype='float32')": "nothing is lost"}
NOISE = 0.05
"""The file holds 4-bit weights, which some formats would reproduce: so much noise, relative to the weights, is added."""
OUT = Path(__file__).parents[1] / "docs" / "solvers.json"


def real_layer(model: Path, rows: int) -> tuple[torch.Tensor, Stats]:
    """Some rows of the weight, and statistics of its inputs in the original model."""
    checkpoint = open_checkpoint(model)
    blocks = Blocks(checkpoint)
    text = load_text(None, "calibration")
    states = list(blocks.begin(text.windows(checkpoint.tokenizer(), 256), 8))
    for index in range(BLOCK):
        blocks.open(index)
        states = [blocks.run(state) for state in states]
    blocks.open(BLOCK)
    seen: list[torch.Tensor] = []
    for state in states:
        blocks.watch(state, [NAME.removesuffix(".weight")], lambda _, x, __: seen.append(x), whole=False)
    x = torch.cat(seen)
    hessian = x.T @ x / len(x)
    stats = Stats(
        second_moment=hessian.diagonal().clone(), hessian=hessian, n_tokens=len(x), data_hash=text.hash
    )
    linear = next(linear for linear in checkpoint.linears() if linear.name == NAME)
    weight = checkpoint.read_matrix(linear)[:rows].float()
    noise = torch.randn(weight.shape, generator=torch.Generator().manual_seed(0))
    return weight + NOISE * weight.std() * noise, stats


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=96)
    parser.add_argument("--model", type=Path, default=None)
    arguments = parser.parse_args()
    weight, stats = real_layer(arguments.model or default_model(), arguments.rows)
    assert stats.hessian is not None
    hessian = stats.hessian.double()
    whole = float(((weight.double() @ hessian) * weight.double()).sum())
    table, rows, wrong = Table(*("format", "bits", *SOLVERS)), [], []
    for spec in (spec for name in names("format") for spec in EXAMPLES.get(name, (name,))):
        format = build("format", spec).resolve("float16")
        if format.misfit(*weight.shape):
            continue
        errors, seconds = [], []
        for solver in SOLVERS:
            start = time.perf_counter()
            lost = (weight - build("solver", solver).solve(weight, format, stats).decode()).double()
            errors.append(float(((lost @ hessian) * lost).sum()) / whole)
            seconds.append(round(time.perf_counter() - start, 3))
        rows.append(
            {"spec": spec, "bits": format.bits_per_weight(4096, 4096), "errors": errors, "seconds": seconds}
        )
        table.add_row(spec, f"{rows[-1]['bits']:.2f}", *(f"{error:.3g}" for error in errors))
        print(spec, *(f"{error:.4g}" for error in errors), file=sys.stderr, flush=True)
        if not (errors[2] < errors[1] and errors[3] < errors[2]) and spec not in EXCEPT:
            wrong.append(spec)
    facts = {
        "layer": NAME,
        "rows": len(weight),
        "tokens": stats.n_tokens,
        "solvers": SOLVERS,
        "except": EXCEPT,
    }
    OUT.write_text(json.dumps({**facts, "formats": rows}, indent=1) + "\n", encoding="utf-8")
    Console().print(table)
    if wrong:
        print(f"error feedback or refinement did not help: {', '.join(wrong)}", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    main()
