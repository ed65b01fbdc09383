"""What can go where: the grid of formats and exporters, from the exporters' own answers."""

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
    ),
    "float": ("float(dtype='float16')", "float(dtype='bfloat16')", "float(dtype='float32')"),
}
"""Specs worth a row of their own; a format that is not listed has one row, with its defaults."""


def grid() -> str:
    """A Markdown table: every format against every exporter, for a [4096, 4096] feed-forward weight."""
    exporters = names("exporter")
    lines = [
        "| format | bits/weight | " + " | ".join(exporters) + " |",
        "|---|---:|" + "---|" * len(exporters),
    ]
    linear = Linear(name="w", rows=4096, columns=4096, role="ffn.up", block=0, input_group="w")
    for spec in (spec for name in names("format") for spec in EXAMPLES.get(name, (name,))):
        answers = [_answer(name, spec, linear) for name in exporters]
        bits = build("format", spec).resolve("float16").bits_per_weight(*linear.shape)
        lines.append(f"| `{spec}` | {bits:.3f} | " + " | ".join(answers) + " |")
    return "\n".join(lines) + "\n"


def engines() -> str:
    """A Markdown table: which runtimes read what an exporter writes."""
    lines = ["| exporter | read by |", "|---|---|"]
    lines += [f"| {name} | {', '.join(get('exporter', name).engines)} |" for name in names("exporter")]
    return "\n".join(lines) + "\n"


def _answer(exporter: str, spec: str, linear: Linear) -> str:
    """Yes, or the exporter's reason; also whether it takes 8-bit activations with it."""
    writer = build("exporter", exporter)
    format = build("format", spec).resolve("float16")
    plain, rounded = (writer.accepts(linear, format, activations) for activations in (None, 8))
    if plain is None and rounded is None:
        return "yes, also with 8-bit activations"
    if rounded is None:
        return "with 8-bit activations"
    return "yes" if plain is None else f"no: {plain}"
