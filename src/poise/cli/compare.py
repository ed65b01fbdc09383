"""poise compare: which candidates are good enough, on the same samples."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from poise.cli import terminal, vote
from poise.core.errors import UsageError

if TYPE_CHECKING:
    from poise.core.verdict import Range

FAILED, UNDECIDED = 3, 4


def run(
    original: Annotated[str, typer.Argument(help="artifact, folder, .gguf file or hub id")],
    candidates: Annotated[
        list[str],
        typer.Argument(help="any number of models to judge, or running endpoints: http://.../v1#MODEL"),
    ],
    text: Annotated[
        list[str] | None,
        typer.Option(
            help="UTF-8 text, .jsonl or data set of the hub; one domain each; default: a short sample"
        ),
    ] = None,
    prompts: Annotated[
        list[Path] | None, typer.Option(help=".jsonl with questions: answers, choices, references")
    ] = None,
    task: Annotated[
        list[str] | None, typer.Option(help="task of lm-evaluation-harness (extra: tasks)")
    ] = None,
    task_limit: Annotated[int | None, typer.Option(min=1, help="first items of each task")] = None,
    task_folder: Annotated[Path | None, typer.Option(help="folder with task definitions of your own")] = None,
    protocol: Annotated[str, typer.Option(help="windows (512 tokens), gptq-2048 or llamacpp")] = "windows",
    windows: Annotated[
        int | None, typer.Option(min=1, help="read at most so many windows of each text")
    ] = None,
    answer_tokens: Annotated[int, typer.Option(min=1, help="longest answer")] = 128,
    gate: Annotated[
        list[str] | None,
        typer.Option(help="range of a figure, e.g. kl<=0.05, accuracy_change>=-0.02"),
    ] = None,
    engine: Annotated[list[str] | None, typer.Option(help="one engine a candidate, in order")] = None,
    original_engine: Annotated[str | None, typer.Option(help="engine of the original")] = None,
    judge: Annotated[
        str | None,
        typer.Option(
            help="model that compares answers, or an endpoint, http://.../v1#MODEL (key: OPENAI_API_KEY)"
        ),
    ] = None,
    efficiency: Annotated[bool, typer.Option(help="measure memory and latency too")] = False,
    human: Annotated[
        bool, typer.Option("--human", help="then serve the blind page where people vote, as poise vote does")
    ] = False,
    force: Annotated[bool, typer.Option(help="read texts that a candidate was calibrated on")] = False,
    seed: Annotated[int, typer.Option(help="of the draws behind intervals")] = 0,
    out: Annotated[
        Path,
        typer.Option("--out", "-o", help="folder for verdict.json, report.html, report.md, scores.jsonl"),
    ] = Path("comparison"),
    as_json: Annotated[bool, typer.Option("--json", help="print verdict.json")] = False,
) -> None:
    """Judge candidates against an original. Exit code 0: all pass, 3: one fails, 4: more samples are needed.

    Example:

      poise compare original q4.gguf q3.gguf --text my-domain.txt --prompts questions.jsonl -o comparison
    """
    from poise import pipeline
    from poise.core.verdict import FAIL, INCONCLUSIVE
    from poise.pipeline.candidates import Tasks
    from poise.reports import console
    from poise.reports.verdict import verdict_json

    if human and not prompts:
        raise UsageError("--human needs --prompts: people vote on answers")
    with terminal.progress() as progress:
        verdict = pipeline.compare(
            original,
            candidates,
            texts=text or (),
            prompts=prompts or (),
            tasks=Tasks(names=tuple(task or ()), limit=task_limit, folder=task_folder),
            protocol=protocol,
            windows=windows,
            answer_tokens=answer_tokens,
            ranges=_ranges(gate or []),
            engines=engine or (),
            original_engine=original_engine,
            judge=judge,
            efficiency=efficiency,
            force=force,
            seed=seed,
            out=out,
            progress=progress,
        )
    if as_json:
        print(verdict_json(verdict), end="")
    else:
        console.print_verdict(terminal.out, verdict, out)
    if human:
        vote.run(out)
    code = {FAIL: FAILED, INCONCLUSIVE: UNDECIDED}.get(verdict.verdict, 0)
    if code:
        raise typer.Exit(code)


def _ranges(wishes: list[str]) -> "dict[str, Range]":
    """``NAME<=VALUE`` and ``NAME>=VALUE``; two of one figure are its two ends."""
    from poise.core.verdict import Range

    ends: dict[str, dict[str, float]] = {}
    for wish in wishes:
        name, sign, limit = next((wish.partition(s) for s in ("<=", ">=") if s in wish), (wish, "", ""))
        try:
            ends.setdefault(name.strip(), {})["at_most" if sign == "<=" else "at_least"] = float(limit)
        except ValueError as error:
            raise UsageError(f"--gate {wish}: write NAME<=VALUE or NAME>=VALUE") from error
    try:
        return {name: Range(**limits) for name, limits in ends.items()}
    except ValueError as error:
        raise UsageError(f"--gate: {error}") from error
