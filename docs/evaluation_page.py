"""Parts of docs/evaluation-checked.md: what was measured stands in agreement.json and ranking.json."""

import json
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent


def parts() -> list[str]:
    """Paragraphs, headings and tables, in order."""
    found = ["How far the figures of [evaluation](evaluation.md) can be trusted, as far as it was measured."]
    agreement, ranking = FOLDER / "agreement.json", FOLDER / "ranking.json"
    if agreement.exists():
        found += agreement_parts(json.loads(agreement.read_text(encoding="utf-8")))
    if ranking.exists():
        found += ranking_parts(json.loads(ranking.read_text(encoding="utf-8")))
    found += [
        "## Statistics",
        "By simulation, in the test suite: `python -m pytest tests/statistics`. At the margin at most 5 % of runs pass, at a figure "
        "within its range at most 5 % fail, intervals cover with clustered samples, a planted loss is caught at the stated rate.",
        "## Tasks, BLEU, ROUGE",
        "Tests compare with the libraries: `tests/pipeline/test_harness.py` item by item with lm-evaluation-harness and its own model "
        "class, `tests/metrics/test_answer_metrics.py` with sacrebleu and rouge-score.",
        "## Cost",
        "`make bench-scoring` measures what scoring adds to the two models' own forward passes, and memory with eight times the text.",
    ]
    return found


def agreement_parts(facts: dict[str, Any]) -> list[str]:
    """The table of `make bench-agreement`."""
    rows = ["| | llama-perplexity | poise | difference |", "|---|---:|---:|---:|"]
    for row in facts["rows"]:
        rows.append(
            f"| {row['figure']} | {row['llama-perplexity']:.5g} | {row['poise']:.5g} | {row['difference']:+.2%} |"
        )
    return [
        "## Against llama-perplexity",
        f"`make bench-agreement LLAMA_PERPLEXITY=PATH`: SmolLM2-135M-Instruct as F16 and Q4_0 files, {facts['chunks']} windows of 512 tokens, "
        "protocol `llamacpp`. The bar is 0.5 %.",
        "\n".join(rows),
    ]


def ranking_parts(facts: dict[str, Any]) -> list[str]:
    """The table of `make bench-ranking`."""
    rows = [
        f"| | {' | '.join(f'{bits} bits' for bits in facts['bits'])} | Spearman | cannot tell apart |",
        "|---|" + "---:|" * (len(facts["bits"]) + 1) + "---|",
    ]
    for row in facts["rows"]:
        values = " | ".join("" if value is None else f"{value:.4g}" for value in row["values"])
        pairs = ", ".join(f"{a.rpartition('-')[2]} and {b.rpartition('-')[2]}" for a, b in row["alike"])
        name = row["metric"].replace("_", " ")
        rows.append(
            f"| {name if row['held'] else f'({name})'} | {values} | {row['spearman']:.2f} | {pairs} |"
        )
    return [
        "## Order by bits",
        "`make bench-ranking`: SmolLM2-135M-Instruct at six widths, integers in groups of 64, ranges by search. Spearman's correlation of each "
        "metric with the bits; the bar is 0.9 for all but those in brackets, which are neither fidelity nor proxies of quality, or are "
        "a model's own variety and relevance, of which most widths keep as much; what can order them is the shift, how far single answers moved. The last "
        "column has neighbours whose 95 % intervals overlap.",
        "\n".join(rows),
    ]
