"""Tables for a terminal."""

from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Column, Table

from poise.core.artifact import Artifact
from poise.core.checkpoint import Checkpoint
from poise.core.comparison import Comparison, Side
from poise.core.format import FormatFacts
from poise.core.plan import Plan, PlanRow
from poise.core.verdict import Strength, Verdict
from poise.reports.figures import human, interval, ratio, span
from poise.reports.report import figure_rows

VERDICTS = {
    "reached": "[green]reached[/]",
    "missed": "[red]missed[/]",
    "not measured": "[dim]not measured[/]",
}


def print_plan(console: Console, plan: Plan) -> None:
    """Matrices by format; every kept one, and every wish that was not met, with its reason; what is done before and afterwards."""
    table = Table(
        "format", "solver", "matrices", "weights", "roles", title=escape(f"{plan.recipe} for {plan.exporter}")
    )
    groups: dict[tuple[str, str], list[PlanRow]] = {}
    for row in plan.rows:
        inputs = f", {row.activations}-bit inputs" if row.activations else ""
        groups.setdefault((f"{row.format or 'kept'}{inputs}", row.solver or ""), []).append(row)
    for (format, solver), rows in groups.items():
        roles = ", ".join(dict.fromkeys(row.role for row in rows))
        weights = sum(row.rows * row.columns for row in rows)
        table.add_row(format, solver, str(len(rows)), f"{weights:,}", roles)
    console.print(table)
    for reason, rows in _remarks(plan).items():
        roles = ", ".join(dict.fromkeys(row.role for row in rows))
        console.print(
            escape(f"  {len(rows)} x {roles}: {reason}"),
            style="yellow" if rows[0].kept else "dim",
            highlight=False,
        )
    around = {"before": ", ".join(plan.transforms), "afterwards": plan.tune, "not trained": plan.untrained}
    for when, what in around.items():
        if what:
            console.print(escape(f"  {when}: {what}"), highlight=False)


def _remarks(plan: Plan) -> dict[str, list[PlanRow]]:
    """What a reader should know: why matrices are kept, and why a wish gave way to a later one."""
    remarks: dict[str, list[PlanRow]] = {}
    for row in plan.rows:
        if row.kept:
            remarks.setdefault(f"kept: {row.reason}", []).append(row)
        for refused in row.reason.split("; not ")[1:] if not row.kept else ():
            remarks.setdefault(f"not {refused}", []).append(row)
    return remarks


def print_artifact(console: Console, artifact: Artifact) -> None:
    """What was made, in one line."""
    manifest = artifact.manifest
    console.print(
        f"[bold]{escape(str(artifact.path))}[/]: {manifest.weight_bytes / 1e6:.1f} MB, {manifest.bits_per_weight:.3f} bits per "
        f"weight (source {manifest.source_bytes / 1e6:.1f} MB); quantized linears {manifest.linear_bits_per_weight:.3f}; "
        f"every tensor read back bit for bit"
    )


def print_checkpoint(console: Console, checkpoint: Checkpoint) -> None:
    """One row a role and storage type, and the tensors that are not matrices in one row."""
    linears = {linear.name: linear for linear in checkpoint.linears()}
    table = Table(
        "role", "stored as", "tensors", "weights", "bytes", "bits/weight", title=escape(checkpoint.source)
    )
    groups: dict[tuple[str, str], list[tuple[int, int]]] = {}
    for name, info in checkpoint.tensors().items():
        role = "+".join(linears[name].roles) if name in linears else "norms, biases, tables"
        groups.setdefault((role, info.stored), []).append((info.numel, info.nbytes))
    for (role, stored), sizes in groups.items():
        weights, nbytes = sum(n for n, _ in sizes), sum(b for _, b in sizes)
        bits = f"{8 * nbytes / max(1, weights):.3f}"
        table.add_row(role, stored, str(len(sizes)), f"{weights:,}", f"{nbytes:,}", bits)
    console.print(table)


def print_tensors(console: Console, checkpoint: Checkpoint) -> None:
    """Every tensor on a line of its own."""
    linears = {linear.name: linear for linear in checkpoint.linears()}
    name_column = Column("tensor", overflow="fold")
    table = Table(name_column, "shape", "role", "stored as", "bytes", title=escape(checkpoint.source))
    for name, info in checkpoint.tensors().items():
        role = "+".join(linears[name].roles) if name in linears else ""
        table.add_row(escape(name), "x".join(map(str, info.shape)), role, info.stored, f"{info.nbytes:,}")
    console.print(table)


def print_comparison(console: Console, comparison: Comparison) -> None:
    """Every figure beside its gate."""
    table = Table(
        "gate", "measured", "asked", "", title=escape(f"{comparison.candidate.label} on {comparison.text}")
    )
    for gate in comparison.gates:
        name = gate.name.replace("_", " ") + (" [bold](decides)[/]" if gate.quality else "")
        table.add_row(name, human(gate.value), gate.limit, VERDICTS[gate.verdict])
    console.print(table)
    fidelity = Table("fidelity to the original", "value", "95 % interval")
    for score in comparison.scores:
        fidelity.add_row(score.name.replace("_", " "), human(score.value, score.unit), interval(score))
    console.print(fidelity)
    figures = Table("figure", _column(comparison.reference), _column(comparison.candidate))
    for row in figure_rows(comparison):
        figures.add_row(*row)
    console.print(figures)


def print_sides(console: Console, sides: list[Side]) -> None:
    """Measurements side by side, with ratios to the first model."""
    table = Table("figure", *(_column(side) for side in sides))
    for score in sides[0].scores:
        cells = []
        for side in sides:
            value = side.value(score.name)
            times = f"  ({ratio(value, score.value):.2f}x)" if side is not sides[0] and value == value else ""
            cells.append(human(value, score.unit) + times)
        table.add_row(score.name.replace("_", " "), *cells)
    console.print(table)


WORDS = {
    "pass": "[green]PASS[/]",
    "fail": "[red]FAIL[/]",
    "inconclusive": "[yellow]INCONCLUSIVE[/]",
    "not measured": "[dim]not measured[/]",
}


def print_verdict(console: Console, verdict: Verdict, folder: Path) -> None:
    """A verdict a candidate with its reason, and what it rests on."""
    table = Table(
        "candidate", "verdict", "size", "KL", "why", title=escape(f"against {verdict.original.label}")
    )
    for row in verdict.rows:
        why = "; ".join((row.reason, *row.notes))
        figures = human(row.value("size"), "bytes"), human(row.value("kl"))
        table.add_row(escape(row.side.label), WORDS[row.verdict], *figures, escape(why))
    console.print(table)
    for row in verdict.rows:
        found = Table(
            "figure", "value", "90 % interval", "asked", "", "would fail from", title=escape(row.side.label)
        )
        for item in row.findings:
            limits = str(item.allowed), WORDS[item.verdict], human(item.detectable)
            found.add_row(item.name.replace("_", " "), human(item.value), span(item), *limits)
        console.print(found)
    console.print(escape(f"The report is {folder / 'report.html'}"), highlight=False)


def print_strengths(console: Console, rows: list[Strength]) -> None:
    """What people voted."""
    table = Table("model", "chance of winning against the original", "95 % interval", "votes")
    for row in rows:
        table.add_row(
            escape(row.name), f"{row.value:.2f}", f"{row.low:.2f} to {row.high:.2f}", str(row.votes)
        )
    console.print(table if rows else "no votes yet")


def _column(side: Side) -> str:
    return escape(f"{side.label}\n{side.engine}")


def print_formats(console: Console, rows: list[FormatFacts]) -> None:
    """One row a format; of one alone, also why an exporter does not take it."""
    right = [
        Column(header, justify="right")
        for header in ("bits/weight", "group", "width", "dB", "dB, heavy tails")
    ]
    table = Table("format", *right, "exporters")
    for row in rows:
        taken = ", ".join(name for name, answer in row.exporters.items() if not answer.startswith("no"))
        width = "row" if row.width == 0 else str(row.width)
        ratios = ("" if ratio is None else f"{ratio:.2f}" for ratio in (row.gaussian, row.heavy))
        table.add_row(
            escape(row.spec), f"{row.bits_per_weight:.4f}", str(row.group), width, *ratios, taken or "none"
        )
    console.print(table)
    for name, answer in rows[0].exporters.items() if len(rows) == 1 else ():
        console.print(escape(f"  {name}: {answer}"), highlight=False)


def print_choices(console: Console, rows: list[tuple[int, str, str]]) -> None:
    """Chosen texts: number, reason and how each begins."""
    table = Table("window", "chosen", Column("begins", overflow="ellipsis", no_wrap=True))
    for number, reason, text in rows:
        table.add_row(str(number), reason, escape(" ".join(text.split())[:60]))
    console.print(table)
