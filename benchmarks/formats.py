"""Number formats against llama.cpp's encoders, against published errors, and against their bars of speed and memory.

    python benchmarks/formats.py [--only blocks errors speed memory] [--out docs/formats.json]

Prints Markdown. ``--out`` also stores the figures, from which ``make docs`` writes docs/formats.md. Always exits with 0:
it is a report, each bar is marked reached or MISSED. Takes five minutes on two cores that do nothing else; llama.cpp and
Poise are timed in turn, round by round, so that a machine that slows down slows both.
"""

import argparse
import json
import os
import platform
import re
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from expected import LLOYD_MAX, LLOYD_MAX_TERNARY, NF4, blockwise_error, bof4_levels, nearest, power_error
from ggml import Ggml
from poise.core.format import Format
from poise.core.registry import build, names
from poise.core.run import versions
from poise.core.slabs import WEIGHTS, one_thread_each
from poise.core.stats import Stats
from poise.layouts.gguf_blocks import STOCK, pack
from poise.pipeline import examine
from poise.planning.grid import specs
from poise.reports.report import formats_json

COLUMNS = 4096
ROUNDS = 5
BLOCKS = {**{name: name for name in STOCK}, "mxfp4": "mxfp4", "nvfp4": "nvfp4(tensor_scale=False)"}
"""GGML type -> the spec that its bytes hold."""
NO_SEARCH = ("mxfp4", "nvfp4", "tq1_0", "tq2_0", "q2_0")
"""llama.cpp takes the scale of the largest weight here: the bar is 10 % below it."""
OPTIMAL = ("q1_0",)
"""Both are at the optimum."""
MEMORY_BAR = 8


class Table:
    """A Markdown table with a verdict in its last column."""

    def __init__(self, title: str, text: str, *header: str) -> None:
        self.title, self.text, self.header = title, text, [*header, ""]
        self.rows: list[list[str]] = []

    def add(self, *cells: str, reached: bool | None) -> None:
        self.rows.append([*cells, "" if reached is None else "reached" if reached else "**MISSED**"])
        print(f"{self.title}: {' | '.join(self.rows[-1])}", file=sys.stderr)

    def record(self) -> dict[str, object]:
        return {"title": self.title, "text": self.text, "header": self.header, "rows": self.rows}

    def markdown(self) -> str:
        lines = [f"### {self.title}", "", self.text, "", f"| {' | '.join(self.header)} |"]
        lines.append("|---" + "|---:" * (len(self.header) - 2) + "|---|")
        lines += [f"| {' | '.join(row)} |" for row in self.rows]
        return "\n".join(lines) + "\n"


def gaussian(rows: int, columns: int = COLUMNS, seed: int = 0) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def error(weight: Tensor, decoded: Tensor, importance: Tensor | None = None) -> float:
    """sum(importance (w - w')^2) / sum(importance w^2)."""
    given = torch.ones(weight.shape[1]) if importance is None else importance
    squared = ((weight - decoded).double().square() * given).sum() / (weight.double().square() * given).sum()
    return float(squared)


def solve(weight: Tensor, spec: str, solver: str = "search", importance: Tensor | None = None) -> Tensor:
    """The decoded weight."""
    stats = None if importance is None else Stats(second_moment=importance, n_tokens=1, data_hash="")
    return build("solver", solver).solve(weight, build("format", spec), stats).decode()


def blocks() -> Table:
    """Stock blocks: the same weights, the same bytes, both decoded by llama.cpp."""
    table = Table(
        "Stock blocks of llama.cpp",
        "Relative squared error of the same Gaussian weights at the same bytes, both decoded by llama.cpp: its own C encoder "
        "(without importance or with a flat one, whichever is lower) and Poise's `search`. Weighted: both with the same "
        "uneven importance of columns. Bar: lower; at least 10 % lower where llama.cpp does no search; equal for "
        "`q1_0`, where both are at the optimum. (`mxfp4` has only powers of two to choose scales from, and Poise tries them all: "
        "what is measured is the least that its bytes allow.)",
        "block", "bits/weight", "llama.cpp", "Poise", "ratio", "ratio, weighted", "bar",
    )  # fmt: skip
    ggml, weight = Ggml(), gaussian(32)
    importance = torch.rand(COLUMNS, generator=torch.Generator().manual_seed(1)) ** 3 + 1e-3
    flat = torch.ones(COLUMNS)
    for name, spec in BLOCKS.items():
        block, format = name.upper(), build("format", spec).resolve("float16")
        ratios = []
        for given, tries in ((None, (None, flat)), (importance, (importance,))):
            stats = None if given is None else Stats(second_moment=given, n_tokens=1, data_hash="")
            packed = pack(build("solver", "search").solve(weight, format, stats))
            theirs = [ggml.encode(block, weight, each) for each in tries]
            assert all(each.shape == packed.shape for each in theirs)
            ours = error(weight, ggml.decode(block, packed, COLUMNS), given)
            best = min(error(weight, ggml.decode(block, each, COLUMNS), given) for each in theirs)
            ratios.append((best, ours, ours / best))
        bar = 0.9 if name in NO_SEARCH else 1.0
        (best, ours, ratio), weighted = ratios[0], ratios[1][2]
        reached = ratio <= 1 + 1e-5 if name in OPTIMAL else ratio < bar
        figures = (f"{best:.4g}", f"{ours:.4g}", f"{ratio:.3f}", f"{weighted:.3f}")
        wanted = "1 (equal)" if name in OPTIMAL else f"< {bar:g}"
        bits = f"{format.bits_per_weight(32, COLUMNS):.4f}"
        table.add(f"`{name}`", bits, *figures, wanted, reached=reached)
    return table


def errors() -> Table:
    """Formats of papers at the error that the paper's method has."""
    table = Table(
        "Against published errors",
        "Relative squared error of Gaussian weights. `e8` and `trellis` are held to a bound; the others are encoded as "
        "published (scales that cover the group, `rtn`; for `kmeans` and `ternary` the optimum, `search`) and must be within 2 % "
        "of the expected error or below. Expected: Max's printed tables for `kmeans` (rows of 65536, which hardly adapt to "
        "their sample) and `ternary`, 1 - 2 / pi for `binary`. The papers of `nf`, `bof` and `power` were not found to print an error on "
        "Gaussian weights: theirs follow by numerical integration from NF4's printed levels, from BOF4's expectation "
        "maximization on drawn blocks, and from PowerQuant's companding at its best exponent, all without Poise's code "
        "(`benchmarks/expected.py`). The last column of figures is what `search` makes of the same bits.",
        "format", "expected", "measured", "ratio", "with `search`",
    )  # fmt: skip
    for spec, rows, bar in (("e8", 64, 0.095), ("trellis", 32, 0.075)):
        measured = error(weight := gaussian(rows), solve(weight, spec))
        table.add(
            f"`{spec}`", f"< {bar:.3f}", f"{measured:.4f}", "", f"{measured:.4f}", reached=measured < bar
        )
    wanted = {
        "nf4": blockwise_error(nearest(NF4), 64),
        "bof(signed=False)": blockwise_error(nearest(bof4_levels(64, signed=False)), 64),
        "bof4": blockwise_error(nearest(bof4_levels(64, signed=True)), 64),
        **{f"power{bits}": power_error(bits, 64) for bits in (3, 4, 5)},
        **{f"kmeans{bits}": LLOYD_MAX[bits] for bits in LLOYD_MAX},
        "ternary": LLOYD_MAX_TERNARY,
        "binary(group='channel')": 1 - 2 / torch.pi,
    }
    short, long = gaussian(512, seed=3), gaussian(16, 65536, seed=4)
    for spec, expected in wanted.items():
        published = "rtn" if re.match("nf|bof|power", spec) else "search"
        weight = long if spec.startswith("kmeans") else short
        measured, best = (error(weight, solve(weight, spec, solver)) for solver in (published, "search"))
        figures = (f"{expected:.5f}", f"{measured:.5f}", f"{measured / expected:.3f}", f"{best:.5f}")
        table.add(f"`{spec}`", *figures, reached=measured <= 1.02 * expected)
    return table


def rate_bar(spec: str, format: Format) -> float | None:
    """Million weights a second that the kind of format must reach; None for codebooks of vectors and products."""
    if spec.startswith("trellis"):
        return 0.05
    if re.fullmatch(r"q\d_k", spec):
        return 8
    if format.width == 1:
        return 30 if not re.match("iq[123]", spec) else 2
    return None if re.match("vector|binary-lowrank", spec) else 2


def speed() -> Table:
    """Million weights a second of solvers and of llama.cpp, timed in turn."""
    threads = torch.get_num_threads()
    table = Table(
        "Speed",
        f"Million weights a second with {threads} threads, scales and codes, the fastest of {ROUNDS} rounds. `search` and the "
        "second column of llama.cpp are given the same uneven importance, without which most of llama.cpp's encoders do "
        "not search; the first is without, to be compared with `rtn`. Bars are for `search`: 30 for scalar formats, 8 for "
        "K-quants, 2 for lattices, 0.05 for `trellis`; and each but `trellis` must have at least a third of the speed of "
        "the encoder of llama.cpp that does the same, `rtn` and `search` alike.",
        "format", "`rtn`", "llama.cpp", "ratio", "`search`", "llama.cpp, weighted", "ratio", "bar",
    )  # fmt: skip
    ggml, kinds = Ggml(), {spec: name for name, spec in BLOCKS.items()}
    importance = torch.rand(COLUMNS, generator=torch.Generator().manual_seed(1)) ** 3 + 1e-3
    stats = Stats(second_moment=importance, n_tokens=1, data_hash="")
    for spec in dict.fromkeys((*specs(), *BLOCKS.values())):
        format = build("format", spec).resolve("float16")
        ways = {
            solver: partial(build("solver", solver).solve, format=format, stats=stats)
            for solver in ("rtn", "search")
        }
        if spec in kinds:
            block = kinds[spec].upper()
            encode, few = partial(ggml.encode, block), gaussian(4)
            if not ggml.needs_importance(block):
                ways["plain"] = partial(encode, threads=threads)
            if (encode(few) != encode(few, importance)).any():
                ways["weighted"] = partial(encode, importance=importance, threads=threads)
        rates = interleaved(ways)
        pairs = [
            (rates[ours], rates.get(theirs)) for ours, theirs in (("rtn", "plain"), ("search", "weighted"))
        ]
        bar = rate_bar(spec, format)
        slow = any(theirs is not None and ours < theirs / 3 for ours, theirs in pairs)
        cells = [
            cell
            for ours, theirs in pairs
            for cell in (
                f"{ours:.3g}",
                *(("", "") if theirs is None else (f"{theirs:.3g}", f"{ours / theirs:.2f}")),
            )
        ]
        reached = None if bar is None else rates["search"] >= bar and not slow
        table.add(f"`{spec}`", *cells, "" if bar is None else f"{bar:g}", reached=reached)
    return table


def interleaved(ways: dict[str, Callable[[Tensor], object]]) -> dict[str, float]:
    """Million weights a second of each way, in turn, each on as many rows as take it a while."""
    weight = gaussian(MOST)
    rows = {name: enough(way, weight) for name, way in ways.items()}
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(ROUNDS):
        for name, way in ways.items():
            if sum(seconds[name]) < 5:  # trellis has fewer rounds
                seconds[name].append(timed(way, weight[: rows[name]]))
    return {name: COLUMNS * rows[name] / min(seconds[name]) / 1e6 for name in ways}


def enough(way: Callable[[Tensor], object], weight: Tensor) -> int:
    """Rows that take a twentieth of a second or more: a slab for each of two threads at least."""
    way(weight[:16])  # compiles, and fills tables
    rows = 2 * WEIGHTS // COLUMNS
    while rows < MOST and timed(way, weight[:rows]) < 0.05:
        rows *= 2
    return rows


MOST = 2048
"""Rows of the largest sample that speed is measured on."""


def timed(way: Callable[[Tensor], object], weight: Tensor) -> float:
    start = time.perf_counter()
    way(weight)
    return time.perf_counter() - start


def memory() -> Table:
    """Peak of fit and round on a slab, measured in a process whose allocator gives back what is freed."""
    table = Table(
        "Memory",
        "Peak resident memory of `search` (scales and codes) on one slab of a million weights, beyond the slab, in multiples of "
        f"the slab's float32 bytes. Bar: {MEMORY_BAR}.",
        "format", "peak",
    )  # fmt: skip
    if not Path("/proc/self/clear_refs").exists():
        return table  # only Linux resets its peak
    settings = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0", "MALLOC_ARENA_MAX": "1"}
    command = [sys.executable, __file__, "--peaks"]
    done = subprocess.run(
        command, env={**os.environ, **settings}, stdout=subprocess.PIPE, text=True, check=True
    )
    for spec, peak in json.loads(done.stdout).items():
        table.add(f"`{spec}`", f"{peak:.1f}", reached=peak <= MEMORY_BAR)
    return table


def peaks() -> dict[str, float]:
    """Peak of every format over the bytes of its slab."""
    found, solver = {}, build("solver", "search")
    with one_thread_each():
        for spec in specs():
            format = build("format", spec).resolve("float16")
            rows = 16 if spec.startswith("trellis") else WEIGHTS // COLUMNS * 4
            solver.solve_slab(gaussian(16), format, None, None, None)  # compiles
            slab = gaussian(rows)
            Path("/proc/self/clear_refs").write_text("5")
            before = resident("VmHWM")
            kept = solver.solve_slab(slab, format, None, None, None)
            found[spec] = (resident("VmHWM") - before) / (4 * slab.numel())
            del kept
    return found


def resident(key: str) -> int:
    """Bytes of a line of /proc/self/status."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key))
    return 1024 * int(line.split()[1])


def levels(spec: str) -> list[float]:
    """Values of a group after ``fit`` on Gaussian weights, over the largest; empty if rounded jointly or too many."""
    format = build("format", spec).resolve("float16")
    if format.width != 1 or format.bits > 8:
        return []
    # All rows share what was fitted to the first, and run through its range.
    first = gaussian(1, 1024)
    params = format.fit(first)
    shared = format.shared
    reach = 1.5 * float(first.abs().max())
    fine = torch.logspace(-6, 0, 2000)  # of floats, small levels are dense
    points = reach * torch.cat((torch.linspace(-1, 1, 4000), fine, -fine))
    ramp = points.view(-1, 1).expand(-1, 1024).contiguous()
    wide = {
        key: value if key in shared else value.expand(len(ramp), *value.shape[1:])
        for key, value in params.items()
    }
    values = format.decode(format.round(ramp, wide), wide)[:, 0]
    return sorted({round(float(value), 4) for value in values / values.abs().max()})


TABLES = {"blocks": blocks, "errors": errors, "speed": speed, "memory": memory}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="+", choices=TABLES, default=list(TABLES), help="some of the tables")
    parser.add_argument("--out", type=Path, help="store the figures as JSON")
    parser.add_argument("--peaks", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.peaks:
        print(json.dumps(peaks()))
        return
    start = time.perf_counter()
    tables = {name: TABLES[name]() for name in arguments.only}
    for table in tables.values():
        print(table.markdown(), flush=True)
    missed = sum(row[-1] == "**MISSED**" for table in tables.values() for row in table.rows)
    print(f"{missed} missed, {len(names('format'))} formats, {time.perf_counter() - start:.0f} s")
    if arguments.out:
        store(arguments.out, tables)


def store(path: Path, tables: dict[str, Table]) -> None:
    """The figures, for the documentation; tables that were not made now stay as they were."""
    before = json.loads(path.read_text(encoding="utf-8"))["tables"] if path.is_file() else {}
    record = {
        "schema_version": 1,
        "machine": f"{torch.get_num_threads()} threads of {processor()}",
        "versions": versions(),
        "facts": json.loads(formats_json(examine(specs())))["formats"],
        "levels": {spec: found for spec in specs() if (found := levels(spec))},
        "tables": {**before, **{name: table.record() for name, table in tables.items()}},
    }
    text = json.dumps(record, indent=1)
    short = re.sub(r"\[[-\d.,\s]+\]", lambda found: " ".join(found[0].split()), text)  # levels on one line
    path.write_text(short + "\n", encoding="utf-8")


def processor() -> str:
    """The processor's name as the system gives it."""
    info = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*: (.*)", info.read_text()) if info.exists() else None
    return found[1] if found else platform.processor() or platform.machine()


if __name__ == "__main__":
    main()
