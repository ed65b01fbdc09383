"""(candidate, reference) -> logits on the same windows -> scores -> gates."""

import importlib.util
import math
import os
import shlex
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch

from poise.calibration.overlap import ALLOWED, overlap
from poise.calibration.text import load_text
from poise.checkpoints import open_checkpoint
from poise.core.artifact import CARD, SHINGLES, Artifact, find_artifact
from poise.core.checkpoint import Checkpoint
from poise.core.comparison import AT_MOST, DEFAULT_GATES, QUALITY, Comparison, Gate, Side
from poise.core.engine import Engine
from poise.core.errors import CheckpointError, EngineError, PoiseError, UsageError
from poise.core.metric import LogitMetric, Score, Subject, SystemMetric
from poise.core.registry import build, get, names
from poise.core.run import peak_memory, resident_memory, versions
from poise.engines.torch import DTYPES
from poise.pipeline.progress import Progress, silent
from poise.reports.card import model_card
from poise.reports.figures import ratio
from poise.reports.report import write_report


def evaluate(
    candidate: str | Path,
    reference: str | Path,
    *,
    text: str | Path | None = None,
    window: int = 256,
    windows: int | None = None,
    engine: str | None = None,
    reference_engine: str | None = None,
    efficiency: bool = True,
    out: str | Path | None = None,
    progress: Progress = silent,
) -> Comparison:
    """Measures what a quantized model lost and saved.

    Args:
        candidate, reference: artifacts, folders, ``.gguf`` files or hub ids.
        text: UTF-8 file; None for the short sample that comes with Poise.
        window: tokens of a window; ``windows`` limits their number.
        engine, reference_engine: specs of engines; by default ``llamacpp`` for GGUF files and ``torch``.
        efficiency: whether to measure memory and latency too.
        out: folder for ``report.json``, ``report.md`` and its picture; None for no files.

    Raises:
        PoiseError: a model, text or engine cannot be used; nothing is written.
    """
    artifact = find_artifact(candidate)
    if artifact and (damaged := [name for name in artifact.damaged() if name != CARD]):
        raise CheckpointError(
            f"{candidate}: {', '.join(damaged)} differ from the manifest; quantize it again"
        )
    if out is not None and Path(out).exists() and not Path(out).is_dir():
        raise UsageError(f"{out} is a file; name a folder for the report")
    models = [open_checkpoint(_model(reference)), open_checkpoint(_model(candidate))]
    _check_vocabularies(models)
    engines = [reference_engine or default_engine(models[0]), engine or default_engine(models[1])]
    source = load_text(text, "evaluation")
    if artifact and artifact.manifest.calibration == source.hash:
        raise UsageError(f"{source.name} is what the model was calibrated on; evaluate on another text")
    window = min([window, *(model.context for model in models if model.context)])
    cut = source.windows(models[0].tokenizer(), window, windows)
    if artifact:
        _refuse_known(artifact, source.name, [models[0].tokenizer().decode(item) for item in cut])
    samples = _fidelity(models, engines, cut, progress)
    protocol = f"windows of {window} tokens, not overlapping, computed in float32 where the engine is torch"
    sides = _sides(models, engines, [reference, candidate], samples, protocol, efficiency, progress)
    scores = tuple(
        _logit_metric(name).score(_key(name), samples[name], protocol) for name in _fidelity_names()
    )
    comparison = Comparison(
        reference=sides[0],
        candidate=sides[1],
        text=f"{source.name} ({len(cut)} windows, {sum(map(len, cut))} tokens)",
        text_hash=source.hash,
        scores=scores,
        samples={_key(name): values for name, values in samples.items()},
        gates=(),
        command=_command(
            candidate,
            reference,
            text=text,
            window=window,
            windows=windows,
            engines=(engine, reference_engine),
        ),
        versions=versions(),
    )
    comparison = _gated(comparison, artifact)
    if out is not None:
        write_report(comparison, Path(out))
    if artifact:
        artifact.replace_card(model_card(artifact.manifest, artifact.plan, comparison))
    return comparison


def bench(
    sources: Sequence[str | Path], engines: Sequence[str] = (), progress: Progress = silent
) -> list[Side]:
    """Size, memory and latency of models side by side, taking turns.

    Args:
        engines: one engine spec a model, or none for the defaults.
    """
    if engines and len(engines) != len(sources):
        raise UsageError(f"{len(sources)} models but {len(engines)} engines: give one for each, or none")
    models = [open_checkpoint(_model(source)) for source in sources]
    chosen = list(engines) or [default_engine(model) for model in models]
    return _measure(models, chosen, sources, _system_names(), progress)


def probe(source: str | Path, engine: str) -> dict[str, int]:
    """Resident bytes before loading a model and at the peak of loading it and reading 64 tokens.

    Meant for a fresh process: the peak is of the whole life of this one.
    """
    checkpoint = open_checkpoint(source)
    runner = build("engine", _native(engine, checkpoint))
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


def _model(source: str | Path) -> str | Path:
    artifact = find_artifact(source)
    return artifact.model if artifact else source


def _key(name: str) -> str:
    return name.replace("-", "_")


def _fidelity_names() -> list[str]:
    """Metrics of the candidate against the reference: all that read logits but the candidate's own one."""
    return [
        name
        for name in names("metric")
        if issubclass(metric := get("metric", name), LogitMetric)
        and metric.per == "token"
        and name != "perplexity"
    ]


def _system_names() -> list[str]:
    return [name for name in names("metric") if issubclass(get("metric", name), SystemMetric)]


def _logit_metric(name: str) -> LogitMetric:
    metric: LogitMetric = get("metric", name)()
    return metric


def _check_vocabularies(models: list[Checkpoint]) -> None:
    """Before anything is loaded: a token that a model lacks would end in the middle of its runtime."""
    rows = [
        next((linear.rows for linear in model.linears() if linear.role == "embedding"), 0) for model in models
    ]
    if all(rows):
        _compare_vocabularies(*rows)


def _compare_vocabularies(reference: int, candidate: int) -> None:
    if reference != candidate:
        raise PoiseError(
            f"vocabularies of {reference} and {candidate} tokens cannot be compared: "
            "candidate and reference must share a tokenizer"
        )


def _command(
    candidate: str | Path,
    reference: str | Path,
    *,
    text: str | Path | None,
    window: int,
    windows: int | None,
    engines: tuple[str | None, str | None],
) -> str:
    """The command line that gives the same quality figures again."""
    parts = ["poise", "evaluate", _label(candidate), "--reference", _label(reference)]
    parts += ["--text", Path(text).name] if text else []
    parts += ["--window", str(window)] if window != 256 else []
    parts += ["--windows", str(windows)] if windows else []
    for option, engine in zip(("--engine", "--reference-engine"), engines, strict=True):
        parts += [option, engine] if engine else []
    return shlex.join(parts)


def _label(source: str | Path) -> str:
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


def _started(engine: str, checkpoint: Checkpoint) -> Engine:
    runner: Engine = build("engine", engine)
    if checkpoint.kind not in runner.reads:
        raise EngineError(
            f"{checkpoint.source}: the engine {engine} reads {' and '.join(runner.reads)}, this is {checkpoint.kind}"
        )
    runner.load(checkpoint)
    return runner


def _native(engine: str, checkpoint: Checkpoint) -> str:
    """Efficiency is measured in the dtype that the model is stored in, fidelity in float32."""
    native = str(checkpoint.dtype).removeprefix("torch.")
    if native not in DTYPES:
        native = "float32"
    return f"torch(dtype={native!r})" if engine == "torch" else engine


def _refuse_known(artifact: Artifact, name: str, texts: list[str]) -> None:
    """Refuses a text that shares passages with what the model was calibrated on."""
    file = artifact.path / SHINGLES
    if not file.exists():
        return
    share = overlap(texts, np.fromfile(file, dtype="<i8"))
    if share > ALLOWED:
        raise UsageError(
            f"{name} shares {share:.0%} of its passages with what the model was calibrated on; evaluate on another text"
        )


def _fidelity(
    models: list[Checkpoint], engines: list[str], windows: list[list[int]], progress: Progress
) -> dict[str, list[float]]:
    """Scores of every window: fidelity, and the perplexity of both sides."""
    samples: dict[str, list[float]] = {
        name: [] for name in (*_fidelity_names(), "perplexity", "reference-perplexity")
    }
    metrics = {name: _logit_metric(name) for name in (*_fidelity_names(), "perplexity")}
    with _started(engines[0], models[0]) as original, _started(engines[1], models[1]) as quantized:
        for number, window in enumerate(windows, 1):
            p, q = (torch.log_softmax(engine.logits(window)[:-1], -1) for engine in (original, quantized))
            _compare_vocabularies(p.shape[1], q.shape[1])
            following = torch.tensor(window[1:])
            for name, metric in metrics.items():
                samples[name].append(metric.sample(p, q, following))
            samples["reference-perplexity"].append(metrics["perplexity"].sample(p, p, following))
            progress("evaluate", number, len(windows))
    return samples


def _sides(
    models: list[Checkpoint],
    engines: list[str],
    sources: Sequence[str | Path],
    samples: dict[str, list[float]],
    protocol: str,
    efficiency: bool,
    progress: Progress,
) -> list[Side]:
    metric = _logit_metric("perplexity")
    own = [
        metric.score("perplexity", samples[key], protocol) for key in ("reference-perplexity", "perplexity")
    ]
    measured = _measure(models, engines, sources, _system_names() if efficiency else ["size"], progress)
    return [
        Side(
            label=side.label,
            source=side.source,
            engine=side.engine,
            fingerprint=side.fingerprint,
            scores=(score, *side.scores),
        )
        for side, score in zip(measured, own, strict=True)
    ]


def _measure(
    models: list[Checkpoint],
    engines: list[str],
    sources: Sequence[str | Path],
    metrics: Sequence[str],
    progress: Progress,
) -> list[Side]:
    natives = [_native(engine, model) for engine, model in zip(engines, models, strict=True)]
    subjects = [
        Subject(
            label=_label(source),
            checkpoint=model,
            engine=engine,
            start=partial(_started, engine, model),
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


def _gated(comparison: Comparison, artifact: Artifact | None) -> Comparison:
    """Adds every gate, default and of the recipe, with what was measured for it."""
    wanted = {**DEFAULT_GATES, **(artifact.manifest.gates if artifact else {})}
    figures = _figures(comparison, artifact)
    gates = tuple(
        Gate(
            name=name,
            value=figures[name],
            at_most=limit if name in AT_MOST else None,
            at_least=None if name in AT_MOST else limit,
            quality=name in QUALITY,
        )
        for name, limit in wanted.items()
    )
    return Comparison(**{**comparison.__dict__, "gates": gates})


def _figures(comparison: Comparison, artifact: Artifact | None) -> dict[str, float]:
    before, after = comparison.reference.value, comparison.candidate.value
    scores = (*comparison.reference.scores, *comparison.candidate.scores, *comparison.scores)
    partly = {score.name for score in scores if score.n_unscored}

    def whole(name: str, value: float) -> float:
        return math.nan if name in partly else value  # a model that fails on a window has not passed

    has_linears = artifact is not None and artifact.manifest.linear_weights
    bits = artifact.manifest.linear_bits_per_weight if artifact and has_linears else float("nan")
    return {
        "size_reduction": 1 - ratio(after("size"), before("size")),
        "memory_reduction": 1 - ratio(after("memory"), before("memory")),
        "latency_reduction": 1 - ratio(after("time_per_token"), before("time_per_token")),
        "perplexity_ratio": whole("perplexity_ratio", comparison.value("perplexity_ratio")),
        "kl": whole("kl", comparison.value("kl")),
        "linear_reduction": 1 - bits / 16,
        "decode_speedup": ratio(before("time_per_token"), after("time_per_token")),
        "throughput_gain": ratio(after("throughput"), before("throughput")),
        "quality_kept": whole("perplexity", ratio(before("perplexity"), after("perplexity"))),
    }
