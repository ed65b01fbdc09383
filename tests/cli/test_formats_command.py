"""poise formats: the table of formats, one format examined, and what bad names get."""

import json

import pytest
from typer.testing import CliRunner

from poise.cli import app
from poise.core.errors import UsageError
from poise.core.registry import build, names
from poise.planning.grid import EXAMPLES


def formats(*arguments):
    done = CliRunner().invoke(app, ["formats", *arguments])
    if done.exception:
        raise done.exception
    return done.stdout


def records(*arguments):
    record = json.loads(formats(*arguments, "--json"))
    assert record["schema_version"] == 1
    return record["formats"]


def test_every_format_of_the_registry_has_its_rows():
    rows = records("--no-error")
    assert list(dict.fromkeys(row["name"] for row in rows)) == names("format")
    specs = [row["spec"] for row in rows]
    assert len(set(specs)) == len(specs)
    assert {spec for group in EXAMPLES.values() for spec in group} <= set(specs)
    for row in rows:
        format = build("format", row["spec"]).resolve("float16")
        assert row["bits_per_weight"] == format.bits_per_weight(4096, 4096)
        assert (row["group"], row["width"]) == (format.group_of(4096), format.width)
        assert set(row["exporters"]) == set(names("exporter"))
        assert row["gaussian"] is row["heavy"] is None


def test_a_spec_is_measured_on_normal_and_on_heavy_tailed_weights():
    (four,), (eight,) = records("int(bits=4, group=64)"), records("int8(group=64)")
    assert four["spec"] == "int(bits=4, group=64)"
    assert four["gaussian"] == pytest.approx(20.9, abs=0.2)
    assert four["heavy"] < four["gaussian"]
    assert 22 < eight["gaussian"] - four["gaussian"] < 26  # four bits more


def test_learned_levels_reach_the_printed_error_of_lloyd_max():
    (row,) = records("kmeans2")
    assert row["gaussian"] == pytest.approx(9.30, abs=0.08)  # 0.1175: Max 1960


def test_a_format_that_is_exact_has_no_ratio():
    assert records("float(dtype='float32')")[0]["gaussian"] is None
    assert "inf" in formats("float(dtype='float32')")


def test_a_name_stands_for_its_examples():
    assert [row["spec"] for row in records("int", "q4_0", "--no-error")] == [*EXAMPLES["int"], "q4_0"]


def test_one_format_alone_comes_with_the_exporters_reasons():
    out = formats("q4_k", "--no-error")
    assert "4.5000" in out
    assert "gguf: yes" in out
    assert "compressed-tensors: no: " in out


@pytest.mark.parametrize(
    "spec", ["q4_9", "int(bits=4, group=7)", "int(bits=4", "nf4(colour='red')", "nf(bits=99)"]
)
def test_what_is_no_format_is_refused_with_advice(spec):
    with pytest.raises(UsageError):
        formats(spec)


def test_a_group_that_does_not_divide_the_width_is_refused():
    with pytest.raises(UsageError, match="rows of 4096 are not a multiple"):
        formats("e8(group=24)")
