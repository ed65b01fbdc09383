"""Reports: gates, tables, JSON without NaN."""

import io
import json
import math
from dataclasses import replace

import pytest
from rich.console import Console

from poise.core.comparison import Comparison, Gate, Side
from poise.core.metric import Score
from poise.reports import console
from poise.reports.figures import human, interval, ratio
from poise.reports.report import figure_rows, sides_json, to_json, write_report

NAN = math.nan


def score(name, value, unit="", low=NAN, high=NAN, **more):
    return Score(name=name, value=value, unit=unit, low=low, high=high, protocol=f"how {name} is", **more)


def side(label, perplexity, size, *more):
    scores = (score("perplexity", perplexity, "perplexity"), score("size", size, "bytes"), *more)
    return Side(label=label, source=f"org/{label}", engine="torch", fingerprint="f" * 64, scores=scores)


GATES = (
    Gate(name="size_reduction", value=0.75, at_least=0.5),
    Gate(name="memory_reduction", value=NAN, at_least=0.5),
    Gate(name="decode_speedup", value=2.0, at_least=3.0),
    Gate(name="perplexity_ratio", value=1.01, at_most=1.02, quality=True),
    Gate(name="kl", value=0.01, at_most=0.05, quality=True),
)
COMPARISON = Comparison(
    reference=side("original", 10.0, 8e6),
    candidate=side("small", 10.1, 2e6, score("memory", NAN, "bytes", n=0, n_unscored=1)),
    text="a text (2 windows, 512 tokens)",
    text_hash="0123456789abcdef" * 4,
    scores=(
        score("kl", 0.01, "nats", low=0.008, high=0.012, n=2),
        score("top1", NAN, "share", n=0, n_unscored=2),
    ),
    samples={"kl": [0.008, 0.012], "top1": [NAN, math.inf]},
    gates=GATES,
    command="poise evaluate small --reference original",
    versions={"poise": "0.1.0", "python": "3.11"},
)


@pytest.mark.parametrize(
    ("limits", "value", "verdict"),
    [
        ({"at_least": 0.5}, 0.5, "reached"),
        ({"at_least": 0.5}, 0.4999, "missed"),
        ({"at_least": 0.5}, math.inf, "reached"),
        ({"at_least": 0.0}, -0.1, "missed"),
        ({"at_most": 1.02}, 1.02, "reached"),
        ({"at_most": 1.02}, 1.0201, "missed"),
        ({"at_most": 1.02}, math.inf, "missed"),
        ({"at_most": 1.02}, NAN, "not measured"),
        ({"at_least": 0.0}, NAN, "not measured"),
    ],
)
def test_a_gate_has_a_verdict(limits, value, verdict):
    assert Gate(name="kl", value=value, **limits).verdict == verdict


def test_a_gate_has_one_limit():
    assert Gate(name="kl", value=0, at_most=0.05).limit == "<= 0.05"
    assert Gate(name="size_reduction", value=0, at_least=0.0).limit == ">= 0"
    for limits in ({}, {"at_least": 0.0, "at_most": 1.0}):
        with pytest.raises(ValueError, match="needs either at_least or at_most"):
            Gate(name="kl", value=0, **limits)


@pytest.mark.parametrize("value", [0.06, NAN])
def test_quality_gates_alone_decide_and_must_be_measured(value):
    assert COMPARISON.passed, "an efficiency gate is missed, another not measured"
    kl = Gate(name="kl", value=value, at_most=0.05, quality=True)
    assert not replace(COMPARISON, gates=(*GATES[:-1], kl)).passed


def test_figures_are_written_as_people_write_them():
    assert human(1234567, "bytes") == "1.2 MB"
    assert human(0.0123, "seconds") == "12.30 ms"
    assert human(0.012345, "nats") == "0.01235 nats"
    assert human(1.5) == "1.5"
    assert human(NAN, "bytes") == "not measured"
    assert interval(COMPARISON.scores[0]) == "0.008 to 0.012"
    assert interval(COMPARISON.scores[1]) == ""
    assert ratio(1, 4) == 0.25
    assert math.isnan(ratio(1, 0))


def test_json_is_strict_and_whole():
    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    record = json.loads(to_json(COMPARISON), parse_constant=refuse)
    assert record["schema_version"] == 1
    assert record["passed"] is True
    assert [gate["verdict"] for gate in record["gates"]] == [gate.verdict for gate in GATES]
    assert record["gates"][1]["value"] is None
    assert record["samples"]["top1"] == [None, None]
    assert record["samples"]["kl"] == [0.008, 0.012]
    assert record["candidate"]["scores"][2] == {
        "name": "memory",
        "value": None,
        "unit": "bytes",
        "protocol": "how memory is",
        "low": None,
        "high": None,
        "n": 0,
        "n_unscored": 1,
        "rounds": [],
    }
    sides = json.loads(sides_json([COMPARISON.reference, COMPARISON.candidate]), parse_constant=refuse)
    assert [model["label"] for model in sides["models"]] == ["original", "small"]


def test_a_figure_that_one_model_lacks_keeps_its_row():
    rows = {name: (before, after) for name, before, after in figure_rows(COMPARISON)}
    assert rows["size"] == ("8.0 MB", "2.0 MB")
    assert rows["memory"] == ("not measured", "not measured")


def test_markdown_has_every_gate_figure_and_protocol(tmp_path):
    write_report(COMPARISON, tmp_path)
    text = (tmp_path / "report.md").read_text()
    assert text.startswith("# small against original\n")
    assert "Every quality gate is reached." in text
    for gate in GATES:
        name = gate.name.replace("_", " ")
        line = next(line for line in text.splitlines() if line.startswith(f"| {name} |"))
        assert gate.limit in line
        assert gate.verdict in line
        assert ("decides" in line) == gate.quality
    assert "| kl | 0.01 nats | 0.008 to 0.012 | 2 |" in text
    assert "2 unscored" in text
    assert "how memory is" in text
    assert COMPARISON.command in text
    assert COMPARISON.text_hash[:16] in text
    assert "nan" not in text
    missed = replace(COMPARISON, gates=(Gate(name="kl", value=1.0, at_most=0.05, quality=True),))
    write_report(missed, tmp_path)
    assert "A quality gate is missed." in (tmp_path / "report.md").read_text()


def test_tables_of_markdown_have_rows_of_equal_width(tmp_path):
    write_report(COMPARISON, tmp_path)
    for table in (tmp_path / "report.md").read_text().split("\n\n"):
        if table.startswith("|"):
            assert len({line.count("|") for line in table.splitlines()}) == 1, table


def printed(show, *things):
    terminal = Console(file=io.StringIO(), width=160)
    show(terminal, *things)
    return terminal.file.getvalue()


def test_the_terminal_shows_the_same():
    text = printed(console.print_comparison, COMPARISON)
    for gate in GATES:
        assert gate.name.replace("_", " ") in text
    assert text.count("(decides)") == 2
    assert "nan" not in text


def test_sides_have_ratios_to_the_first_and_nothing_is_divided_by_zero():
    zero = replace(COMPARISON.reference, scores=(*COMPARISON.reference.scores, score("memory", 0.0, "bytes")))
    text = printed(console.print_sides, [zero, COMPARISON.candidate])
    assert "2.0 MB  (0.25x)" in text
    assert "original" in text
    assert "not measured" in text


def test_brackets_in_labels_are_no_markup():
    odd = replace(COMPARISON, candidate=replace(COMPARISON.candidate, label="a[/b]c[red]"))
    assert "a[/b]c[red]" in printed(console.print_comparison, odd)
    assert "a[/b]c[red]" in printed(console.print_sides, [odd.reference, odd.candidate])


def test_tensor_names_are_whole_and_no_markup():
    from types import SimpleNamespace

    from poise.core.checkpoint import TensorInfo

    name = "model.layers.0[/b]." + "long." * 30 + "weight"
    info = TensorInfo(shape=(2, 3), stored="float32", nbytes=24)
    checkpoint = SimpleNamespace(linears=list, tensors=lambda: {name: info}, source="[/x]")
    text = printed(console.print_tensors, checkpoint)
    column = [line.split("│")[1].strip() for line in text.splitlines() if "│" in line]
    assert "".join(column) == name
