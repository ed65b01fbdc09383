"""Datasets of the hub: how they are named, what their rows may be, and what happens without the library."""

import sys
import types

import pytest

from poise.calibration.text import load_text
from poise.core.errors import MissingExtra, UsageError


@pytest.fixture
def library(monkeypatch):
    """The ``datasets`` package, as far as it is used; what was asked is kept."""
    asked = []
    module = types.ModuleType("datasets")
    rows = [{"text": "one"}, {"content": "two"}, "three"]

    def load_dataset(name, config, split, streaming):
        asked.append((name, config, split, streaming))
        if "missing" in name:
            raise FileNotFoundError("no such dataset\nmore")
        return [*rows, {"body": "x"}] if "odd" in name else rows

    module.load_dataset = load_dataset
    monkeypatch.setitem(sys.modules, "datasets", module)
    return asked


@pytest.mark.parametrize(
    ("source", "asked"),
    [
        ("hf://org/name", ("org/name", None, "train", True)),
        ("hf://org/name:en", ("org/name", "en", "train", True)),
        ("hf://org/name/validation", ("org/name", None, "validation", True)),
        ("hf://org/na.me-2:a-b/test", ("org/na.me-2", "a-b", "test", True)),
    ],
)
def test_names_and_rows(library, source, asked):
    assert load_text(source, "calibration", None).content == "one\n\ntwo\n\nthree"
    assert library == [asked]


def test_what_is_wrong_is_said(library):
    with pytest.raises(UsageError, match=r"hf://org/odd, row 4: keys body; known are"):
        load_text("hf://org/odd", "calibration", None)
    with pytest.raises(UsageError, match=r"hf://org/missing: cannot be read \(no such dataset\)"):
        load_text("hf://org/missing", "calibration", None)
    with pytest.raises(UsageError, match="is written hf://org/name"):
        load_text("hf://name", "calibration", None)


def test_without_the_library_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(MissingExtra, match=r"poise\[datasets\]"):
        load_text("hf://org/name", "calibration", None)
