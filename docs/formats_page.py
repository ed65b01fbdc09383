"""The page of number formats and its pictures, from the registry and from stored figures.

``docs/formats.json`` holds what was measured (``benchmarks/formats.py --out docs/formats.json``), so that writing the
page takes no time and gives the same bytes everywhere. Bits, groups and exporters come from the code.
"""

import json
import math
import re
from dataclasses import fields
from functools import cache
from pathlib import Path
from textwrap import fill
from typing import Any, NamedTuple

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from poise.core.format import FormatFacts
from poise.core.registry import build, name_of, names, parse_spec, spec_of
from poise.pipeline import examine
from poise.planning.grid import specs

FOLDER = Path(__file__).parent
FIGURES = FOLDER / "formats.json"
COMMAND = "python benchmarks/formats.py --out docs/formats.json && make docs"
TEMPLATES = Environment(
    loader=FileSystemLoader(FOLDER / "templates"),
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)
DECIBELS_A_BIT = 20 * math.log10(2)


class Family(NamedTuple):
    """Formats that are chosen for the same reason; ``names`` is a pattern of registry names."""

    title: str
    names: str
    use: str


FAMILIES = (
    Family(
        "Integers",
        r"int",
        "Equal steps; every engine has kernels for them. The first choice at 4 bits and above: groups of 32 to 128 with a "
        "searched scale, asymmetric where a layer's weights lean to one side.",
    ),
    Family(
        "llama.cpp, scalar and K",
        r"q\d_[01k]|iq4_(nl|xs)|tq\d_0",
        "What a GGUF file holds and llama.cpp runs anywhere. `q4_k` to `q6_k` for most models, `q2_k` and `q3_k` when "
        "memory is short, `iq4_xs` where a quarter of a bit counts; `q4_0` and `iq4_nl` where a width is no multiple of 256; `tq1_0` and `tq2_0` for models that were trained ternary.",
    ),
    Family(
        "llama.cpp, lattices",
        r"iq[123]_\w+",
        "Vectors of 4 or 8 weights from a fixed lattice, 1.5 to 3.5 bits: the least error that llama.cpp reads at these "
        "sizes. Below 3 bits, give them importance from a calibration text.",
    ),
    Family(
        "Floating point",
        r"fp\d|mxfp\d|mxint8|nvfp4|float",
        "Steps that grow with the value, for hardware that multiplies them: `fp8` for weights and activations of recent "
        "accelerators, `mxfp4` and `nvfp4` for the latest. Of normal weights, integers of the same bits lose less; with heavy "
        "tails, `nvfp4` does.",
    ),
    Family(
        "Non-uniform",
        r"nf|bof|power|kmeans|log2|apot",
        "Levels where the weights are: `bof` and `nf` for normal weights in groups, `kmeans` learned for each row, "
        "the best at 2 and 3 bits without groups, `power` searched for each row; `log2` and `apot` for hardware that shifts.",
    ),
    Family(
        "Vectors and trellises",
        r"vector|e8|trellis",
        "Many weights rounded together, near the bound at 2 bits. Weights should look normal (rotate them first). `e8` is "
        "fixed, `vector` learned, `trellis` has the least error and is the slowest to encode.",
    ),
    Family(
        "Ternary and binary",
        r"ternary|binary.*",
        "For research below 2 bits, and for models that were trained with such weights; others lose much.",
    ),
)


@cache
def figures() -> dict[str, Any]:
    """The stored figures."""
    stored: dict[str, Any] = json.loads(FIGURES.read_text(encoding="utf-8"))
    return stored


@cache
def facts() -> tuple[FormatFacts, ...]:
    """Bits, groups and exporters of every spec as the code has them, ratios as they were measured."""
    measured = {row["spec"]: row for row in figures()["facts"]}
    rows = []
    for row in examine(specs(), measure=False):
        known = measured.get(row.spec, {})
        ratios = {key: known.get(key) for key in ("gaussian", "heavy")}
        rows.append(FormatFacts(**{**vars(row), **ratios}))
    return tuple(rows)


def parts() -> list[str]:
    """Sections of docs/formats.md."""
    return [
        "A number format says which values a weight can take and how they are stored. This page shows all that Poise "
        "has, what each costs and what it loses. `poise formats` prints the table, `poise formats \"int(bits=4, "
        "group=64)\"` examines one with arguments of its own; [Formats and exporters](grid.md) has the reasons why an exporter "
        "does not take one, and [Format](concepts/format.md) how to write another.",
        "## Which one",
        _families(),
        "## All formats",
        "Bits per weight count everything stored, for 4096 x 4096 weights with 16-bit scales. Width is how many columns are "
        "rounded together. The ratio of signal to noise is that of `search` without importance, on normal weights and on "
        "weights with heavy tails (Student's t, 5 degrees of freedom): six dB more are one bit more.",
        _table(),
        "## Error against bits",
        "The line is the bound for normal weights that no format can pass, 6.02 dB a bit. Formats that round "
        "one weight at a time stay 2.3 dB or more below it; rounding many together comes closer.",
        "![Signal-to-noise ratio against bits per weight](pictures/rate.svg)",
        "## Levels",
        "The values that the weights of one group can take, relative to the largest, after fitting to normal weights. "
        "Dense levels round finely. Formats with the same levels share a line.",
        "![Levels of scalar formats](pictures/levels.svg)",
        "## Measured",
        f"On {figures()['machine']}, by `make bench-formats`. To refresh: `{COMMAND}`.",
        *(_measured(table) for table in figures()["tables"].values()),
    ]  # fmt: skip


def _families() -> str:
    lines = ["| family | formats | when |", "|---|---|---|"]
    left = set(names("format"))
    for family in FAMILIES:
        members = [name for name in names("format") if re.fullmatch(family.names, name)]
        left -= set(members)
        lines.append(f"| {family.title} | {', '.join(f'`{name}`' for name in members)} | {family.use} |")
    if left:
        raise SystemExit(f"docs/formats_page.py: no family of formats for {', '.join(sorted(left))}")
    return "\n".join(lines)


def _table() -> str:
    lines = [
        "| format | bits/weight | group | width | dB, normal | dB, heavy tails | exporters |",
        "|---|---:|---:|---:|---:|---:|---|",
    ]
    for row in facts():
        taken = ", ".join(name for name, answer in row.exporters.items() if not answer.startswith("no"))
        ratios = " | ".join("" if ratio is None else f"{ratio:.1f}" for ratio in (row.gaussian, row.heavy))
        shape = f"{row.bits_per_weight:.3f} | {row.group} | {row.width or 'row'}"
        lines.append(f"| `{row.spec}` | {shape} | {ratios} | {taken} |")
    return "\n".join(lines)


def _measured(table: dict[str, Any]) -> str:
    header = table["header"]
    rule = "|---" + "|---:" * (len(header) - 2) + "|---|"
    rows = [f"| {' | '.join(row)} |" for row in (header, *table["rows"])]
    text = fill(table["text"], 110, break_long_words=False, break_on_hyphens=False)
    return "\n".join([f"### {table['title']}", "", text, "", rows[0], rule, *rows[1:]])


def short(spec: str) -> str:
    """A label: name and bits, and arguments other than groups and scales."""
    format = build("format", spec)
    name, given = name_of(format), parse_spec(spec_of(format))[1]
    bits = getattr(format, "bits", "") if any(field.name == "bits" for field in fields(format)) else ""
    label = f"{name} ({bits})" if name[-1].isdigit() and bits else f"{name}{bits}" if name in SHORT else name
    words = []
    for key, value in given.items():
        if key not in ("bits", "group", "scale"):
            plain = key.replace("_", " ")
            named = {True: plain, False: NEGATED.get(key, f"no {plain}")} if isinstance(value, bool) else {}
            words.append(named.get(value, value if isinstance(value, str) else f"{plain}={value}"))
    return " ".join([label, *(word for word in words if "minimum" not in words or word == "minimum")])


SHORT = ("int", "nf", "bof", "power", "kmeans", "apot")
"""Names that are written with their bits, as in nf4."""
NEGATED = {"symmetric": "asymmetric", "signed": "unsigned"}


class Dot(NamedTuple):
    """A format in the picture; no label where there is no room."""

    x: float
    y: float
    family: int
    title: str
    label: str
    label_x: float
    label_y: float
    anchor: str


WIDTH, HEIGHT, MARGIN = 960, 860, 56
BITS, DECIBELS = 9.5, 50.0
CHARACTER, LINE = 6.0, 11.0
PLACES = ((8, 4, "start"), (-8, 4, "end"), (0, -9, "middle"), (0, 17, "middle"), (8, -7, "start"), (8, 15, "start"),
          (-8, -7, "end"), (-8, 15, "end"))  # fmt: skip
"""Where a label may stand beside its dot."""


def rate_picture() -> str:
    """Signal-to-noise ratio against bits per weight, with the bound for normal weights."""
    shown = [row for row in facts() if row.gaussian is not None and row.bits_per_weight <= BITS]
    shown.sort(key=lambda row: DECIBELS_A_BIT * row.bits_per_weight - (row.gaussian or 0))
    points = [_at(row.bits_per_weight, row.gaussian or 0) for row in shown]
    taken = [(x - 4, y - 4, x + 4, y + 4) for x, y in points]
    dots, labelled = [], set()
    for row, (x, y) in zip(shown, points, strict=True):
        label, place = short(row.spec), None
        if label not in labelled:
            place = next((p for p in PLACES if _free(_box(x, y, label, p), taken)), None)
        if place is None:
            label, place = "", PLACES[0]
        else:
            labelled.add(label)
            taken.append(_box(x, y, label, place))
        title = f"{row.spec}: {row.bits_per_weight:.3f} bits, {row.gaussian:.1f} dB"
        dots.append(Dot(x, y, _family(row.name), title, label, x + place[0], y + place[1], place[2]))
    return TEMPLATES.get_template("rate.svg.jinja").render(
        dots=dots,
        families=[family.title for family in FAMILIES],
        bound=(_at(0, 0), _at(DECIBELS / DECIBELS_A_BIT, DECIBELS)),
        x_ticks=[(_at(bits, 0)[0], bits) for bits in range(10)],
        y_ticks=[(_at(0, ratio)[1], ratio) for ratio in range(0, 51, 10)],
        width=WIDTH,
        height=HEIGHT,
        margin=MARGIN,
    )


def _at(bits: float, decibels: float) -> tuple[float, float]:
    return (
        MARGIN + (WIDTH - 2 * MARGIN) * bits / BITS,
        HEIGHT - MARGIN - (HEIGHT - 2 * MARGIN) * decibels / DECIBELS,
    )


Box = tuple[float, float, float, float]


def _box(x: float, y: float, label: str, place: tuple[int, int, str]) -> Box:
    dx, dy, anchor = place
    width = CHARACTER * len(label)
    left = x + dx - {"start": 0, "middle": width / 2, "end": width}[anchor]
    return left, y + dy - LINE + 2, left + width, y + dy + 2


def _free(box: Box, taken: list[Box]) -> bool:
    inside = box[0] > MARGIN and box[2] < WIDTH - 4
    return inside and not any(
        box[0] < other[2] and other[0] < box[2] and box[1] < other[3] and other[1] < box[3] for other in taken
    )


def _family(name: str) -> int:
    return next(i for i, family in enumerate(FAMILIES) if re.fullmatch(family.names, name))


class Strip(NamedTuple):
    """Levels as places on a line of the picture."""

    y: float
    label: str
    family: int
    ticks: list[float]


STRIP, LABELS = 22, 250


def levels_picture() -> str:
    """A line of levels for every scalar format, by family and by how many there are."""
    lines: dict[tuple[float, ...], list[str]] = {}
    families: dict[tuple[float, ...], int] = {}
    for spec in specs():
        if not (found := figures()["levels"].get(spec)):
            continue
        mirrored = tuple(-value for value in reversed(found))
        key = max(tuple(found), mirrored, key=lambda values: values[-1])
        near = next((k for k in lines if len(k) == len(key) and _close(k, key)), key)
        families.setdefault(near, _family(name_of(build("format", spec))))
        if (label := short(spec)) not in lines.setdefault(near, []):
            lines[near].append(label)
    ordered = sorted(lines, key=lambda key: (families[key], len(key)))
    span = WIDTH - LABELS - 2 * 16
    strips = [
        Strip(
            40 + STRIP * i, _few(lines[key]), families[key], [LABELS + 16 + span * (v + 1) / 2 for v in key]
        )
        for i, key in enumerate(ordered)
    ]
    return TEMPLATES.get_template("levels.svg.jinja").render(
        strips=strips,
        axis=[(LABELS + 16 + span * (v + 1) / 2, v) for v in (-1, -0.5, 0, 0.5, 1)],
        left=LABELS + 16,
        right=WIDTH - 16,
        width=WIDTH,
        height=40 + STRIP * len(strips) + 8,
    )


def _close(first: tuple[float, ...], second: tuple[float, ...]) -> bool:
    return max(abs(a - b) for a, b in zip(first, second, strict=True)) < 0.01


def _few(labels: list[str]) -> str:
    shown = ", ".join(labels[:3])
    return shown + (", ..." if len(labels) > 3 else "")
