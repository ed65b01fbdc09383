"""What can go where: the grid of formats and exporters, from the exporters' own answers."""

from poise.core.errors import UsageError
from poise.core.linear import Linear
from poise.core.registry import build, get, names

EXAMPLES = {
    "int": (
        "int(bits=4, group=32)",
        "int(bits=4, group=32, symmetric=False)",
        "int(bits=4, group=32, symmetric=False, zero='minimum')",
        "int(bits=4, group=128)",
        "int(bits=5, group=32)",
        "int(bits=5, group=32, symmetric=False, zero='minimum')",
        "int(bits=3, group=64)",
        "int(bits=8, group=32)",
        "int(bits=8, group='channel')",
        "int(bits=8, group='tensor')",
        "int(bits=4, group='128x128', narrow=True, scale='e8m0')",
        "int(bits=4, group=64, symmetric=False, scale='double')",
        "int(bits=2, group=64, symmetric=False)",
    ),
    "fp8": ("fp8", "fp8(variant='e5m2')", "fp8(group='128x128')"),
    "fp6": ("fp6", "fp6(variant='e3m2')"),
    "mxfp6": ("mxfp6", "mxfp6(variant='e3m2')"),
    "mxfp8": ("mxfp8", "mxfp8(variant='e5m2')"),
    "nvfp4": ("nvfp4", "nvfp4(four_over_six=True)", "nvfp4(tensor_scale=False)"),
    "nf": ("nf(bits=2)", "nf(bits=3)", "nf", "nf(scale='double')", "nf(bits=8)"),
    "bof": ("bof(bits=3)", "bof", "bof(signed=False)"),
    "log2": ("log2(bits=3)", "log2"),
    "apot": ("apot", "apot(bits=5)"),
    "power": ("power(bits=3)", "power", "power(exponent='tensor')"),
    "kmeans": ("kmeans(bits=2)", "kmeans(bits=3)", "kmeans"),
    "ternary": ("ternary", "ternary(group='tensor')"),
    "float": ("float(dtype='float16')", "float(dtype='bfloat16')", "float(dtype='float32')"),
    "vector": ("vector", "vector(dim=8, stages=2)"),
}
"""Specs worth a row of their own; a format that is not listed has one row, with its defaults."""

LAYER = Linear(name="w", rows=4096, columns=4096, role="ffn.up", block=0, input_group="w")
"""What exporters are asked about, and bits are counted for: a feed-forward weight."""


def specs(format: str | None = None) -> tuple[str, ...]:
    """Specs of every format, or of one by name; a spec with arguments stands for itself.

    Raises:
        UsageError: no such format, or one that ``LAYER`` cannot have.
    """
    if format is None:
        return tuple(spec for name in names("format") for spec in EXAMPLES.get(name, (name,)))
    if format in names("format"):
        return EXAMPLES.get(format, (format,))
    if (reason := build("format", format).misfit(*LAYER.shape)) is not None:
        raise UsageError(f"{format}: {reason}")
    return (format,)


def answers(spec: str) -> dict[str, str]:
    """Exporter -> ``yes``, perhaps with what goes along, or ``no: `` and the reason; with 16-bit scales."""
    return {name: _answer(name, spec) for name in names("exporter")}


def grid() -> str:
    """A Markdown table: every format against every exporter."""
    exporters = names("exporter")
    lines = [
        "| format | bits/weight | " + " | ".join(exporters) + " |",
        "|---|---:|" + "---|" * len(exporters),
    ]
    for spec in specs():
        bits = build("format", spec).resolve("float16").bits_per_weight(*LAYER.shape)
        lines.append(f"| `{spec}` | {bits:.3f} | " + " | ".join(answers(spec).values()) + " |")
    return "\n".join(lines) + "\n"


def engines() -> str:
    """A Markdown table: which runtimes read what an exporter writes."""
    lines = ["| exporter | read by |", "|---|---|"]
    lines += [f"| {name} | {', '.join(get('exporter', name).engines)} |" for name in names("exporter")]
    return "\n".join(lines) + "\n"


def _answer(exporter: str, spec: str) -> str:
    """Yes, or the exporter's reason; also whether it takes 8-bit activations with it."""
    writer = build("exporter", exporter)
    format = build("format", spec).resolve("float16")
    plain, rounded = (writer.accepts(LAYER, format, activations) for activations in (None, 8))
    if plain is None and rounded is None:
        return "yes, also with 8-bit activations"
    if rounded is None:
        return "with 8-bit activations"
    return "yes" if plain is None else f"no: {plain}"
