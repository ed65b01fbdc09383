"""Whether metrics order models as their bits do: SmolLM2-135M-Instruct at 8, 6, 5, 4, 3 and 2 bits: docs/ranking.json.

    python benchmarks/ranking.py [--windows 8] [--answer-tokens 48] [--solver search]

Integers in groups of 64, asymmetric, all linears of the blocks. Text is technical prose (docstrings of torch and numpy) and the short text that
comes with Poise; prompts are 96: to explain a thing, to write a poem about it, and questions
with short answers. For each metric: Spearman's correlation with the bits, and which neighbours its
95 % intervals cannot tell apart. The program exits with 1 if a metric of fidelity or a proxy is below 0.9. What is finished is kept in
build/ranking.
"""

import argparse
import json
import sys
from math import isfinite
from pathlib import Path

from rich.console import Console
from rich.table import Table
from scipy.stats import spearmanr

import poise
from decoding import default_model
from judging import docstrings
from poise.calibration.text import load_text
from poise.core.plan import Option, Recipe, Rule
from poise.core.run import versions
from poise.reports.html import alike

WORK = Path("build/ranking")
OUT = Path(__file__).resolve().parent.parent / "docs" / "ranking.json"
BITS = (8, 6, 5, 4, 3, 2)
THINGS = [
    "a bridge",
    "a volcano",
    "a library",
    "a vaccine",
    "a glacier",
    "an orchestra",
    "a compass",
    "a mortgage",
    "a telescope",
    "a recipe",
    "a democracy",
    "a battery",
    "a poem",
    "a tide",
    "a bicycle",
    "a novel",
    "a planet",
    "a hospital",
    "a river",
    "a computer",
    "an election",
    "a magnet",
    "a museum",
    "a seed",
    "a lawyer",
    "a rainbow",
    "a train",
    "a village",
    "a muscle",
    "a calendar",
    "a market",
    "a song",
]
COUNTRIES = [
    "France",
    "Italy",
    "Japan",
    "Egypt",
    "Canada",
    "Norway",
    "Greece",
    "Kenya",
    "Peru",
    "India",
    "Spain",
    "Germany",
    "Poland",
    "Austria",
    "Portugal",
    "Sweden",
    "Finland",
    "Ireland",
    "Turkey",
    "Iran",
    "Iraq",
    "Cuba",
    "Chile",
    "Argentina",
    "Brazil",
    "Mexico",
    "Thailand",
    "Vietnam",
    "China",
    "Russia",
    "Hungary",
    "Denmark",
]
EXEMPT = ("kl_noise_floor", "size", "bits_per_weight", "length", "broken_tags", "endless", "loops")
"""Neither fidelity nor proxies of quality, or yes and no of rare events."""
OWN = ("compression", "distinct", "relevance", "self_bleu")
"""Proxies of which most widths keep as much, with other words; what can order them is how far their answers moved."""


def quantize(original: Path, bits: int, solver: str) -> Path:
    """A candidate; one that is there is taken as it is."""
    out = WORK / f"{solver}-{bits}"
    if not (out / "manifest.json").exists():
        keep = [Rule(role=role, options=(), optional=True) for role in ("router", "head", "embedding")]
        option = Option(format=f"int(bits={bits}, group=64, symmetric=False)")
        recipe = Recipe(
            name=f"int{bits}", description="", rules=(*keep, Rule(options=(option,), solver=solver))
        )
        poise.quantize(original, recipe, out, to="compressed-tensors", force=True)
    return out


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--windows", type=int, default=8, help="of each text")
    parser.add_argument("--answer-tokens", type=int, default=48)
    parser.add_argument("--solver", default="search")
    arguments = parser.parse_args()
    WORK.mkdir(parents=True, exist_ok=True)
    original = default_model()
    candidates = [quantize(original, bits, arguments.solver) for bits in BITS]
    (WORK / "docstrings.txt").write_text(docstrings(), encoding="utf-8")
    (WORK / "sample.txt").write_text(load_text(None, "evaluation").content, encoding="utf-8")
    lines = [
        {"question": words.format(thing)}
        for words, things in (
            ("Explain in a few sentences what {} is.", THINGS),
            ("What is the capital of {}? Answer with one word.", COUNTRIES),
            ("Write a short poem about {}.", THINGS),
        )
        for thing in things
    ]
    (WORK / "prompts.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    verdict = poise.compare(
        original,
        candidates,
        texts=[WORK / "docstrings.txt", WORK / "sample.txt"],
        prompts=[WORK / "prompts.jsonl"],
        windows=arguments.windows,
        answer_tokens=arguments.answer_tokens,
        original_engine="torch",
        out=WORK / "comparison",
    )
    names = dict.fromkeys(score.name for row in verdict.rows for score in (*row.scores, *row.side.scores))
    undecided = dict(alike(verdict))
    rows = []
    for name in names:
        values = [row.value(name) for row in verdict.rows]
        spread = all(map(isfinite, values)) and len(set(values)) > 1
        rho = abs(float(spearmanr(BITS, values).statistic)) if spread else 0.0
        rows.append(
            {
                "metric": name,
                "values": [value if isfinite(value) else None for value in values],
                "spearman": rho,
                "alike": undecided.get(name, []),
                "held": name not in (*EXEMPT, *OWN),
            }
        )
    facts = {"bits": BITS, "solver": arguments.solver, "versions": versions(), "rows": rows}
    OUT.write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
    table = Table("metric", *map(str, BITS), "Spearman", "cannot tell apart")
    for row in rows:
        pairs = ", ".join(f"{a.rpartition('-')[2]}/{b.rpartition('-')[2]}" for a, b in row["alike"])
        table.add_row(
            row["metric"],
            *("" if v is None else f"{v:.4g}" for v in row["values"]),
            f"{row['spearman']:.2f}",
            pairs,
        )
    Console(width=160).print(table)
    if low := [row["metric"] for row in rows if row["held"] and row["spearman"] < 0.9]:
        sys.exit(f"below 0.9: {', '.join(low)}")


if __name__ == "__main__":
    main()
