"""Perplexity and divergence beside those of ``llama-perplexity``, for an F16 and a Q4_0 file: docs/agreement.json.

    python benchmarks/agreement.py --llama-perplexity PATH [--chunks 16]

PATH is llama.cpp's own program, for instance built from the source package of llama-cpp-python:

    pip download --no-deps --no-binary :all: llama-cpp-python && tar xzf llama_cpp_python-*.tar.gz
    cmake -B build -S llama_cpp_python-*/vendor/llama.cpp -DCMAKE_BUILD_TYPE=Release -DLLAMA_CURL=OFF
    cmake --build build --target llama-perplexity

The same files and the same text (docstrings of torch and numpy), 512 tokens of context, the second half of each window scored. Exits with 1 if a
figure differs by more than 0.5 %. llama-perplexity keeps the original's log-probabilities in 16 bits, which moves its divergence.
"""

import argparse
import json
import re
import subprocess
import sys
from pathlib import Path

from rich.console import Console
from rich.table import Table

import poise
from decoding import default_model
from judging import docstrings
from poise.core.plan import Option, Recipe, Rule
from poise.core.run import versions

WORK = Path("build/agreement")
OUT = Path(__file__).resolve().parent.parent / "docs" / "agreement.json"
FORMATS = {"f16": "float(dtype='float16')", "q4_0": "int(bits=4, group=32, scale='float16')"}
BAR = 0.005


def made(name: str, spec: str) -> Path:
    """A GGUF file with all matrices in one format."""
    out = WORK / name
    if not (out / "manifest.json").exists():
        recipe = Recipe(name=name, description="", rules=(Rule(options=(Option(format=spec),)),))
        poise.quantize(default_model(), recipe, out, to="gguf", force=True)
    return next(out.glob("*.gguf"))


def theirs(program: Path, model: Path, text: Path, base: Path, chunks: int, compare: bool) -> str:
    """What the program prints."""
    command = [str(program), "-m", str(model), "-f", str(text), "-c", "512", "--chunks", str(chunks)]
    command += ["--kl-divergence-base", str(base), *(["--kl-divergence"] if compare else [])]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return done.stdout + done.stderr


def figure(pattern: str, text: str) -> float:
    found = re.search(pattern, text)
    if not found:
        raise SystemExit(f"llama-perplexity did not print {pattern}:\n{text[-2000:]}")
    return float(found.group(1))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--llama-perplexity", type=Path, required=True)
    parser.add_argument("--chunks", type=int, default=16)
    arguments = parser.parse_args()
    WORK.mkdir(parents=True, exist_ok=True)
    text, base = WORK / "text.txt", WORK / "base.dat"
    text.write_text(docstrings(), encoding="utf-8")
    files = {name: made(name, spec) for name, spec in FORMATS.items()}
    first = theirs(arguments.llama_perplexity, files["f16"], text, base, arguments.chunks, False)
    second = theirs(arguments.llama_perplexity, files["q4_0"], text, base, arguments.chunks, True)
    expected = {
        "perplexity f16": figure(r"PPL = ([\d.]+)", first),
        "perplexity q4_0": figure(r"Mean PPL\(Q\)\s*:\s*([\d.]+)", second),
        "kl q4_0": figure(r"Mean\s+KLD:\s*([\d.]+)", second),
        "top1 q4_0": figure(r"Same top p:\s*([\d.]+)", second) / 100,
    }
    verdict = poise.compare(
        files["f16"], [files["q4_0"]], texts=[text], protocol="llamacpp", windows=arguments.chunks
    )
    (row,) = verdict.rows
    ours = {
        "perplexity f16": next(s.value for s in verdict.original.scores if s.name == "perplexity"),
        "perplexity q4_0": row.value("perplexity"),
        "kl q4_0": row.value("kl"),
        "top1 q4_0": row.value("top1"),
    }
    rows = [
        {"figure": name, "llama-perplexity": value, "poise": ours[name], "difference": ours[name] / value - 1}
        for name, value in expected.items()
    ]
    facts = {"chunks": arguments.chunks, "versions": versions(), "rows": rows}
    OUT.write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
    table = Table("figure", "llama-perplexity", "poise", "difference")
    for item in rows:
        table.add_row(
            str(item["figure"]),
            f"{item['llama-perplexity']:.5g}",
            f"{item['poise']:.5g}",
            f"{item['difference']:+.2%}",
        )
    Console().print(table)
    if missed := [item["figure"] for item in rows if abs(item["difference"]) > BAR]:  # type: ignore[arg-type]
        sys.exit(f"more than 0.5 % apart: {', '.join(map(str, missed))}")


if __name__ == "__main__":
    main()
