"""Names, specs, and what happens when a file is dropped into a folder."""

import subprocess
import sys
import textwrap

import pytest

import poise.formats
from poise.core.errors import UsageError
from poise.core.registry import build, get, name_of, names, parse_spec, spec_of


def test_every_name_resolves_to_one_class():
    for kind in ("format", "solver", "exporter", "engine", "metric"):
        assert names(kind)
        for name in names(kind):
            assert name_of(get(kind, name)) == name


@pytest.mark.parametrize(
    ("spec", "parsed"),
    [
        ("rtn", ("rtn", {})),
        ("int(bits=4, group='channel')", ("int", {"bits": 4, "group": "channel"})),
        ("float()", ("float", {})),
    ],
)
def test_specs_are_read(spec, parsed):
    assert parse_spec(spec) == parsed


@pytest.mark.parametrize(
    "spec", ["int(4)", "int(bits=", "int(bits=open('x'))", "int(bits=4) or 1", "int(**{})"]
)
def test_specs_are_literals_only(spec):
    with pytest.raises(UsageError, match="cannot read"):
        parse_spec(spec)


def test_spec_of_is_the_shortest_spec_that_builds_an_equal_thing():
    spec = "int(bits=3, group=64, symmetric=False)"
    assert spec_of(build("format", spec)) == spec
    assert spec_of(build("format", "int(bits=4, group=32, scale='auto')")) == "int(bits=4, group=32)"
    assert spec_of(build("solver", "rtn()")) == "rtn"


def test_unknown_names_offer_the_nearest():
    with pytest.raises(UsageError, match="did you mean 'search'"):
        get("solver", "serch")
    with pytest.raises(UsageError, match="unknown kind"):
        get("colour", "red")
    with pytest.raises(UsageError, match="takes bits, group"):
        build("format", "int(bit=4)")


def test_a_dropped_file_is_a_format_everywhere(tmp_path, monkeypatch):
    (tmp_path / "halves.py").write_text(
        textwrap.dedent(
            '''
            """Multiples of one half, to show that one file is enough."""
            from dataclasses import dataclass
            from poise.core.format import Format

            @dataclass(frozen=True, kw_only=True)
            class Halves(Format):
                bits = 8
                def group_of(self, columns): return columns
                def cover(self, weight): return {}
                def fit(self, weight, importance=None): return {}
                def at(self, params, columns): return params
                def round(self, weight, params, importance=None, noise=None):
                    return (2 * weight).round().clamp(-128, 127).char()
                def decode(self, codes, params): return codes.float() / 2
                def bits_per_weight(self, rows, columns): return 8.0
                def pack(self, codes, params): return {"codes": codes}
                def unpack(self, stored, columns): return stored["codes"], {}
            '''
        )
    )
    monkeypatch.setattr(poise.formats, "__path__", [*poise.formats.__path__, str(tmp_path)])
    assert "halves" in names("format")
    from poise.planning.grid import grid

    assert "halves" in grid()
    import torch

    quantized = build("solver", "search").solve(torch.tensor([[0.26, 1.0]]), build("format", "halves"))
    assert quantized.decode().tolist() == [[0.5, 1.0]]


@pytest.mark.parametrize("module", ["poise", "poise.cli", "poise.core.plan"])
def test_importing_is_light(module):
    heavy = "torch,transformers,xllamacpp,gguf,compressed_tensors,numpy"
    code = f"import sys, {module}; print([m for m in {heavy.split(',')!r} if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"
