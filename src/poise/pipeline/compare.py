"""(original, candidates) on the same samples -> scores -> findings -> a verdict each."""

import hashlib
import json
import os
import shlex
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from poise.checkpoints import open_checkpoint
from poise.core.artifact import Artifact, write_atomically
from poise.core.errors import UsageError
from poise.core.judge import Judge
from poise.core.run import versions
from poise.core.verdict import Range, Row, Verdict
from poise.endpoints.client import Client, is_address
from poise.judges.endpoint import Endpoint
from poise.judges.local import Local
from poise.pipeline.candidates import NO_TASKS, Job, Tasks
from poise.pipeline.progress import Progress, silent
from poise.pipeline.samples import (
    PROTOCOLS,
    Prompt,
    Window,
    load_texts,
    read_prompts,
)
from poise.pipeline.subjects import (
    default_engine,
    label,
    model_path,
    started,
)
from poise.reports.card import eval_results, model_card
from poise.reports.verdict import write_verdict

ANSWER_TOKENS = 128
DEFAULT_RANGES: dict[str, Range] = {
    "perplexity_ratio": Range(at_most=1.02),
    "accuracy_change": Range(at_least=-0.01),
    "bleu_change": Range(at_least=-2),
    "rouge_l_change": Range(at_least=-2),
    "length_ratio": Range(at_least=0.9, at_most=1.1),
    "latency_ratio": Range(at_most=1.05),
    "judged_win_rate": Range(at_least=0.45),
}
"""What a candidate may lose: a point of accuracy, two points of BLEU and ROUGE, two per cent of perplexity, five of speed in the
same engine, ten of the length of answers either way, five points of a judge's preference."""


def compare(
    original: str | Path,
    candidates: Sequence[str | Path],
    *,
    texts: Sequence[str | Path] = (),
    prompts: Sequence[Path] = (),
    tasks: Tasks = NO_TASKS,
    protocol: str = "windows",
    windows: int | None = None,
    answer_tokens: int = ANSWER_TOKENS,
    ranges: Mapping[str, Range] | None = None,
    engines: Sequence[str] = (),
    original_engine: str | None = None,
    judge: str | None = None,
    efficiency: bool = False,
    force: bool = False,
    seed: int = 0,
    out: str | Path | None = None,
    progress: Progress = silent,
) -> Verdict:
    """Judges any number of candidates on the same samples.

    Args:
        original, candidates: artifacts, folders, ``.gguf`` files or hub ids. A candidate may also be the address of a running
            endpoint, ``http://.../v1#MODEL``: only its answers and its speed are compared.
        texts: UTF-8 files, JSON lines or data sets to read, one domain each; none for the short text that comes with Poise.
        prompts: files of JSON lines with questions to answer (``pipeline/samples.py``).
        tasks: of lm-evaluation-harness.
        protocol: a key of ``PROTOCOLS``; ``windows`` limits their number for each text.
        answer_tokens: longest answer.
        ranges: by figure, added to ``DEFAULT_RANGES`` or instead of them. One that is not measured is not passed.
        engines: one spec a candidate, or none for the defaults.
        judge: a model for a judge, or the address of an endpoint, ``http://.../v1#MODEL``.
        efficiency: whether to measure memory and latency, all models taking turns.
        force: read texts although a candidate was calibrated on them.
        seed: of the draws behind intervals.
        out: folder for ``verdict.json``, ``scores.jsonl``, reports and the cache; None for no files.

    Raises:
        PoiseError: a model, text or engine cannot be used.
    """
    if protocol not in PROTOCOLS:
        raise UsageError(f"no protocol {protocol}; there is {', '.join(PROTOCOLS)}")
    if engines and len(engines) != len(candidates):
        raise UsageError(
            f"{len(candidates)} candidates but {len(engines)} engines: give one for each, or none"
        )
    if out is not None and Path(out).exists() and not Path(out).is_dir():
        raise UsageError(f"{out} is a file; name a folder for the report")
    job = Job(
        sources=[original, *candidates],
        engines=[original_engine, *(engines or (None for _ in candidates))],
        folder=None if out is None else Path(out) / "cache",
        seed=seed,
        progress=progress,
    )
    reading = job.read(load_texts(texts, job.tokenizer), PROTOCOLS[protocol], windows, force)
    asked = [prompt for path in prompts for prompt in read_prompts(Path(path), job.tokenizer)]
    sides = job.sides(efficiency)
    job.judge, job.wished = _judge(judge), set(ranges or {})
    allowed = {**DEFAULT_RANGES, **(ranges or {})}
    rows = [
        job.row(number, reading, asked, tasks, answer_tokens, sides, allowed)
        for number in range(1, len(sides))
    ]
    if job.judge:
        job.judge.close()
    command = _command(
        [original, *candidates],
        {
            "--text": [Path(text).name if Path(text).exists() else text for text in texts],
            "--prompts": [path.name for path in map(Path, prompts)],
            "--task": tasks.names,
            "--task-limit": [tasks.limit] if tasks.limit else [],
            "--task-folder": [tasks.folder.name] if tasks.folder else [],
            "--protocol": [protocol] if protocol != "windows" else [],
            "--windows": [windows] if windows else [],
            "--answer-tokens": [answer_tokens] if answer_tokens != ANSWER_TOKENS else [],
            "--gate": _gates(ranges or {}),
            "--engine": engines,
            "--original-engine": [original_engine] if original_engine else [],
            "--judge": [label(judge)] if judge else [],
            "--seed": [seed] if seed else [],
        },
        ["--efficiency"] * efficiency + ["--force"] * force,
    )
    verdict = Verdict(
        original=job.original_side(sides[0]),
        rows=tuple(row for row, _ in rows),
        data=(*_data(reading, asked), *job.task_data()),
        facts={
            "command": command,
            "versions": versions(),
            "seed": seed,
            "protocol": protocol,
            "answer_tokens": answer_tokens,
        },
    )
    if out is not None:
        Path(out).mkdir(parents=True, exist_ok=True)
        lines = [line for _, found in rows for line in found]
        write_atomically(Path(out) / "scores.jsonl", "".join(json.dumps(line) + "\n" for line in lines))
        write_verdict(verdict, Path(out))
    for artifact, (row, _) in zip(job.artifacts[1:], rows, strict=True):
        if artifact:
            _write_card(artifact, verdict, row)
    return verdict


def _write_card(artifact: Artifact, verdict: Verdict, row: Row) -> None:
    """The verdict goes with the model."""
    if text := eval_results(verdict, row):
        (artifact.path / ".eval_results").mkdir(exist_ok=True)
        write_atomically(artifact.path / ".eval_results" / "poise.yaml", text)
    artifact.replace_card(model_card(artifact.manifest, artifact.plan, judged=(verdict, row)))


def _judge(source: str | None) -> Judge | None:
    """An endpoint by its address, or a model loaded here."""
    if source is None:
        return None
    if is_address(source):
        return Endpoint(Client(source, key=os.environ.get("OPENAI_API_KEY")))
    checkpoint = open_checkpoint(model_path(source))
    start = partial(started, default_engine(checkpoint), checkpoint)
    return Local(label(source), start, checkpoint.tokenizer())


def _data(windows: list[Window], prompts: list[Prompt]) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    for kind, items in (("text", windows), ("prompts", prompts)):
        for domain in dict.fromkeys(item.domain for item in items):
            mine = [item for item in items if item.domain == domain]
            digest = hashlib.sha256(" ".join(item.key for item in mine).encode()).hexdigest()
            documents = len({item.document for item in mine})
            found.append(
                {"kind": kind, "name": domain, "samples": len(mine), "documents": documents, "hash": digest}
            )
    return found


def _command(
    models: Sequence[str | Path], options: Mapping[str, Sequence[object]], flags: Sequence[str]
) -> str:
    """The command line that gives the same figures again."""
    line = ["poise", "compare", *map(label, models)]
    line += [word for option, values in options.items() for value in values for word in (option, str(value))]
    return shlex.join([*line, *flags])


def _gates(ranges: Mapping[str, Range]) -> list[str]:
    """As the command line has them."""
    return [
        f"{name}{sign}{end:g}"
        for name, wish in ranges.items()
        for sign, end in ((">=", wish.at_least), ("<=", wish.at_most))
        if end is not None
    ]
