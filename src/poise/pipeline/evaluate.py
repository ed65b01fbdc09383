"""(candidate, reference) -> logits on the same windows -> scores -> gates."""

import math
import shlex
from collections.abc import Sequence
from pathlib import Path

import torch

from poise.calibration.text import load_text
from poise.checkpoints import open_checkpoint
from poise.core.artifact import Artifact
from poise.core.checkpoint import Checkpoint
from poise.core.comparison import AT_MOST, DEFAULT_GATES, QUALITY, Comparison, Gate, Side
from poise.core.errors import UsageError
from poise.core.metric import LogitMetric
from poise.core.registry import get, names
from poise.core.run import versions
from poise.pipeline.progress import Progress, silent
from poise.pipeline.subjects import (
    check_vocabularies,
    compare_vocabularies,
    default_engine,
    label,
    measure,
    model_path,
    refuse_known,
    started,
    system_names,
    whole_artifact,
)
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
    artifact = whole_artifact(candidate)
    if out is not None and Path(out).exists() and not Path(out).is_dir():
        raise UsageError(f"{out} is a file; name a folder for the report")
    models = [open_checkpoint(model_path(reference)), open_checkpoint(model_path(candidate))]
    check_vocabularies(models)
    engines = [reference_engine or default_engine(models[0]), engine or default_engine(models[1])]
    source = load_text(text, "evaluation")
    if artifact and artifact.manifest.calibration == source.hash:
        raise UsageError(f"{source.name} is what the model was calibrated on; evaluate on another text")
    window = min([window, *(model.context for model in models if model.context)])
    cut = source.windows(models[0].tokenizer(), window, windows)
    if artifact:
        refuse_known(artifact, source.name, [models[0].tokenizer().decode(item) for item in cut])
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


def _logit_metric(name: str) -> LogitMetric:
    metric: LogitMetric = get("metric", name)()
    return metric


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
    parts = ["poise", "evaluate", label(candidate), "--reference", label(reference)]
    parts += ["--text", Path(text).name] if text else []
    parts += ["--window", str(window)] if window != 256 else []
    parts += ["--windows", str(windows)] if windows else []
    for option, engine in zip(("--engine", "--reference-engine"), engines, strict=True):
        parts += [option, engine] if engine else []
    return shlex.join(parts)


def _fidelity(
    models: list[Checkpoint], engines: list[str], windows: list[list[int]], progress: Progress
) -> dict[str, list[float]]:
    """Scores of every window: fidelity, and the perplexity of both sides."""
    samples: dict[str, list[float]] = {
        name: [] for name in (*_fidelity_names(), "perplexity", "reference-perplexity")
    }
    metrics = {name: _logit_metric(name) for name in (*_fidelity_names(), "perplexity")}
    with started(engines[0], models[0]) as original, started(engines[1], models[1]) as quantized:
        for number, window in enumerate(windows, 1):
            p, q = (torch.log_softmax(engine.logits(window)[:-1], -1) for engine in (original, quantized))
            compare_vocabularies(p.shape[1], q.shape[1])
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
    measured = measure(models, engines, sources, system_names() if efficiency else ["size"], progress)
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
