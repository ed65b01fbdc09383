"""What every driver of a peer shares: its command line, the tokens, and the proof that what it wrote is what was asked.

    python benchmarks/peers/PEER.py MODEL TOKENS OUT --bits 3 --group 64 [--recipe NAME] [--seed 0]

MODEL is a Hugging Face folder, TOKENS a safetensors file with ``calibration``: int64 [windows, length]. A driver quantizes
all linears of the decoder and writes OUT: the model with the peer's values as float32, the de-quantization being the
peer's own, and ``peer.json``: version, settings, seconds of the quantization alone, bits a weight, peak memory.

Each driver runs in an environment of its own, where Poise is not installed; this file needs torch and safetensors.
"""

import argparse
import json
import os
import resource
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

# A driver bears the name of what it drives. With its folder on the path, `import hqq` would find the driver.
HERE = Path(__file__).resolve().parent
sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != HERE]

LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True, kw_only=True)
class Task:
    """What a driver is asked for.

    Attributes:
        model: folder of the original.
        tokens: file of the calibration tokens.
        out: folder to write.
        bits: of a code.
        group: weights of one row that share a scale and a zero point.
        recipe: which of the peer's methods.
        seed: of every random draw.
    """

    model: Path
    tokens: Path
    out: Path
    bits: int
    group: int
    recipe: str
    seed: int

    def windows(self) -> Any:
        """Calibration tokens, int64 [windows, length]."""
        from safetensors.torch import load_file

        return load_file(self.tokens)["calibration"]


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What a peer made of a model.

    Attributes:
        weights: every tensor of the model by its name in MODEL, linears de-quantized by the peer.
        seconds: of the quantization alone.
        bits: a weight of the linears, with scales and zero points.
        settings: what the peer was told, for the record.
    """

    weights: Mapping[str, Any]
    seconds: float
    bits: float
    settings: dict[str, Any]


def is_linear(name: str) -> bool:
    """Whether a tensor is the matrix of a decoder's linear."""
    return name.endswith(".weight") and name.split(".")[-2] in LINEARS


def most_values(weight: Any, group: int) -> int:
    """The largest number of distinct values in any group of a matrix [rows, columns]."""
    rows, columns = weight.shape
    ordered = weight.float().reshape(rows * (columns // group), group).sort(-1).values
    return int((ordered.diff(dim=-1) != 0).sum(-1).max()) + 1


def check(weights: Mapping[str, Any], original: Mapping[str, Any], task: Task) -> None:
    """Refuses what is not a model of ``bits``-bit groups.

    Raises:
        SystemExit: a tensor is missing or of another shape, a linear is as it was, not finite, or has a group with more
            values than codes.
    """
    for name, before in original.items():
        if name not in weights:
            raise SystemExit(f"{name}: missing in what the peer made")
        after = weights[name]
        if after.shape != before.shape:
            raise SystemExit(f"{name}: {tuple(after.shape)}, was {tuple(before.shape)}")
        if not after.isfinite().all():
            raise SystemExit(f"{name}: not finite")
        if not is_linear(name):
            continue
        if (after == before).all():
            raise SystemExit(f"{name}: not quantized")
        if (found := most_values(after, task.group)) > 2**task.bits:
            raise SystemExit(
                f"{name}: a group of {task.group} has {found} values, {task.bits} bits have {2**task.bits}"
            )


def affine_bits(task: Task, scale: int = 16, zero: int | None = None) -> float:
    """Bits a weight of codes with a scale and a zero point a group; the zero point is a code unless said otherwise."""
    return task.bits + (scale + (task.bits if zero is None else zero)) / task.group


def drive(package: str, recipes: Mapping[str, Callable[[Task], Outcome]], about: str | None) -> None:
    """Reads the command line, runs the recipe, checks and writes. The first recipe is the default."""
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("tokens", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--bits", type=int, required=True)
    parser.add_argument("--group", type=int, default=64)
    parser.add_argument("--recipe", choices=list(recipes), default=next(iter(recipes)))
    parser.add_argument("--seed", type=int, default=0)
    arguments = vars(parser.parse_args())
    task = Task(
        **{key: value.resolve() if isinstance(value, Path) else value for key, value in arguments.items()}
    )
    os.chdir(tempfile.mkdtemp(prefix="peer-"))  # some write logs to where they are started

    import torch
    from safetensors.torch import load_file, save_file

    torch.manual_seed(task.seed)
    start = time.perf_counter()
    outcome = recipes[task.recipe](task)
    total = time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    original = load_file(task.model / "model.safetensors")
    weights = {name: outcome.weights[name].detach().float().contiguous() for name in original}
    check(weights, original, task)
    task.out.mkdir(parents=True, exist_ok=True)
    save_file(weights, task.out / "model.safetensors", metadata={"format": "pt"})
    for file in task.model.glob("*.json"):
        if not file.name.startswith("model.safetensors"):
            shutil.copy(file, task.out / file.name)
    facts = {
        "name": package,
        "version": version(package),
        "torch": version("torch"),
        "recipe": task.recipe,
        "settings": outcome.settings,
        "bits": task.bits,
        "group": task.group,
        "seed": task.seed,
        "stored": outcome.bits,
        "seconds": outcome.seconds,
        "seconds_in_all": total,
        "peak_bytes": peak,
    }
    (task.out / "peer.json").write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(facts))
