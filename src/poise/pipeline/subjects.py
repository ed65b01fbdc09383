"""Models as the user names them: opened, called something, loaded into engines, measured."""

import importlib.util
import math
import os
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np

from poise.calibration.overlap import ALLOWED, overlap
from poise.checkpoints import open_checkpoint
from poise.core.artifact import CARD, SHINGLES, Artifact, find_artifact
from poise.core.checkpoint import Checkpoint
from poise.core.comparison import Side
from poise.core.engine import Engine
from poise.core.errors import CheckpointError, EngineError, PoiseError, UsageError
from poise.core.metric import Score, Subject, SystemMetric
from poise.core.registry import build, get, names
from poise.core.run import peak_memory, resident_memory
from poise.engines.torch import DTYPES
from poise.pipeline.progress import Progress, silent


def whole_artifact(source: str | Path) -> Artifact | None:
    """The artifact at a place, if it is one.

    Raises:
        CheckpointError: files of it differ from its manifest.
    """
    artifact = find_artifact(source)
    if artifact and (damaged := [name for name in artifact.damaged() if name != CARD]):
        raise CheckpointError(f"{source}: {', '.join(damaged)} differ from the manifest; quantize it again")
    return artifact


def bench(
    sources: Sequence[str | Path],
    engines: Sequence[str] = (),
    progress: Progress = silent,
    price: float | None = None,
) -> list[Side]:
    """Size, memory and latency of models side by side, taking turns.

    Args:
        engines: one engine spec a model, or none for the defaults.
        price: of an hour of this machine, in any currency, for the cost of a million tokens.
    """
    if engines and len(engines) != len(sources):
        raise UsageError(f"{len(sources)} models but {len(engines)} engines: give one for each, or none")
    models = [open_checkpoint(model_path(source)) for source in sources]
    chosen = list(engines) or [default_engine(model) for model in models]
    sides = measure(models, chosen, sources, system_names(), progress)
    return [_priced(side, price) for side in sides] if price is not None else sides


def _priced(side: Side, price: float) -> Side:
    """With what a million generated tokens cost, one stream at a time."""
    speed = side.value("throughput")
    cost = price / (3600 * speed) * 1e6 if speed > 0 else math.nan
    protocol = f"{price:g} an hour over the throughput of one stream"
    score = Score(
        name="cost_per_million_tokens", value=cost, unit="of the price's currency", protocol=protocol
    )
    return Side(**{**side.__dict__, "scores": (*side.scores, score)})


def probe(source: str | Path, engine: str) -> dict[str, int]:
    """Resident bytes before loading a model and at the peak of loading it and reading 64 tokens.

    Meant for a fresh process: the peak is of the whole life of this one.
    """
    checkpoint = open_checkpoint(source)
    runner = build("engine", native(engine, checkpoint))
    checkpoint.linears()  # imports the code of the architecture, 125 MB that are not the model
    before = resident_memory()
    with runner:
        runner.load(checkpoint)
        runner.logits(list(range(1, 65)))
        return {"before": before, "peak": peak_memory()}


def default_engine(checkpoint: Checkpoint) -> str:
    """llama.cpp for what it reads, if it is installed; else torch."""
    if checkpoint.kind == "gguf" and importlib.util.find_spec("xllamacpp"):
        return "llamacpp"
    return "torch"


def model_path(source: str | Path) -> str | Path:
    """What an engine is pointed at."""
    artifact = find_artifact(source)
    return artifact.model if artifact else source


def system_names() -> list[str]:
    """Metrics of what a model costs."""
    return [name for name in names("metric") if issubclass(get("metric", name), SystemMetric)]


def check_vocabularies(models: list[Checkpoint]) -> None:
    """Before anything is loaded: a token that a model lacks would end in the middle of its runtime."""
    rows = [
        next((linear.rows for linear in model.linears() if linear.role == "embedding"), 0) for model in models
    ]
    if all(rows):
        compare_vocabularies(*rows)


def compare_vocabularies(reference: int, candidate: int) -> None:
    """Raises ``PoiseError`` when they differ."""
    if reference != candidate:
        raise PoiseError(
            f"vocabularies of {reference} and {candidate} tokens cannot be compared: "
            "candidate and reference must share a tokenizer"
        )


def label(source: str | Path) -> str:
    """What a model is called in reports: no path of this machine."""
    path = Path(source)
    if not path.exists():
        return str(source)
    if path.name in ("", ".."):
        path = path.resolve()
    return (
        path.name
        if path.name not in ("gguf", "compressed-tensors")
        else f"{path.absolute().parent.name}/{path.name}"
    )


def started(engine: str, checkpoint: Checkpoint) -> Engine:
    """An engine with the model loaded; raises ``EngineError`` when it does not read this kind."""
    runner: Engine = build("engine", engine)
    if checkpoint.kind not in runner.reads:
        raise EngineError(
            f"{checkpoint.source}: the engine {engine} reads {' and '.join(runner.reads)}, this is {checkpoint.kind}"
        )
    runner.load(checkpoint)
    return runner


def native(engine: str, checkpoint: Checkpoint) -> str:
    """Efficiency is measured in the dtype that the model is stored in, fidelity in float32."""
    stored = str(checkpoint.dtype).removeprefix("torch.")
    if stored not in DTYPES:
        stored = "float32"
    return f"torch(dtype={stored!r})" if engine == "torch" else engine


def refuse_known(artifact: Artifact, name: str, texts: list[str]) -> None:
    """Refuses a text that shares passages with what the model was calibrated on."""
    file = artifact.path / SHINGLES
    if not file.exists():
        return
    share = overlap(texts, np.fromfile(file, dtype="<i8"))
    if share > ALLOWED:
        raise UsageError(
            f"{name} shares {share:.0%} of its passages with what the model was calibrated on; evaluate on another text"
        )


def measure(
    models: list[Checkpoint],
    engines: list[str],
    sources: Sequence[str | Path],
    metrics: Sequence[str],
    progress: Progress,
) -> list[Side]:
    """Scores of all models by metrics of cost; they take turns."""
    natives = [native(engine, model) for engine, model in zip(engines, models, strict=True)]
    subjects = [
        Subject(
            label=label(source),
            checkpoint=model,
            engine=engine,
            start=partial(started, engine, model),
            probe=[sys.executable, "-m", "poise", "probe", os.fspath(model.path), "--engine", engine],
        )
        for source, model, engine in zip(sources, models, natives, strict=True)
    ]
    scores: list[list[Score]] = [[] for _ in subjects]
    for number, name in enumerate(metrics, 1):
        for known, new in zip(scores, get("metric", name)().measure(subjects), strict=True):
            known.extend(new)
        progress(f"measure {name}", number, len(metrics))
    return [
        Side(
            label=subject.label,
            source=subject.checkpoint.source,
            engine=engine,
            fingerprint=subject.checkpoint.fingerprint(),
            scores=tuple(found),
        )
        for subject, engine, found in zip(subjects, engines, scores, strict=True)
    ]
