"""The model card: metadata that hubs read, and the figures."""

import pytest
import yaml
from test_report import COMPARISON, GATES

from poise.core.artifact import Manifest
from poise.core.plan import Plan, PlanRow
from poise.reports.card import model_card


def row(name, format):
    return PlanRow(
        name=name, role="other", rows=2, columns=2, format=format, solver=None, activations=None, reason="r"
    )


PLAN = Plan(
    recipe="mobile",
    exporter="gguf",
    rows=(row("a", "int(bits=4)"), row("b", "int(bits=4)"), row("c", None)),
)


def manifest(**changes):
    return Manifest(
        **{
            "source": "org/model",
            "source_fingerprint": "f",
            "source_bytes": 1000,
            "recipe": "mobile",
            "exporter": "gguf",
            "model": "model.gguf",
            "plan_hash": "h",
            "calibration": None,
            "gates": {},
            "weights": 1234567,
            "weight_bytes": 800000,
            "bits_per_weight": 5.184,
            "linear_weights": 1000000,
            "linear_bits_per_weight": 4.5,
            "command": "poise quantize org/model --recipe mobile --to gguf",
            "versions": {"poise": "0.1.0"},
            "commit": None,
            "dirty": False,
            "files": {},
            **changes,
        }
    )


def front_matter(card):
    begin, matter, _ = card.split("---\n", 2)
    assert begin == ""
    return yaml.safe_load(matter)


@pytest.mark.parametrize("source", ["org/model", "2024", "yes", "a: b", 'it\'s "quoted"', "- x", "<&>"])
def test_the_front_matter_is_yaml_whatever_the_model_is_called(source):
    matter = front_matter(model_card(manifest(source=source), PLAN, None))
    assert matter["base_model"] == source
    assert matter["base_model_relation"] == "quantized"
    assert matter["library_name"] == "gguf"
    assert matter["tags"] == ["poise", "quantized", "gguf"]


def test_the_library_follows_the_container():
    card = model_card(manifest(exporter="compressed-tensors"), PLAN, None)
    assert front_matter(card)["library_name"] == "transformers"
    assert "compressed-tensors" in front_matter(card)["tags"]


def test_what_was_made_is_told():
    card = model_card(manifest(commit="0123456789abcdef"), PLAN, None)
    assert "| weights | 1,234,567 |" in card
    assert "0.8 MB (5.184 bits per weight" in card
    assert "1,000,000 weights at 4.500 bits" in card
    assert "| `int(bits=4)` | 2 |" in card
    assert "| `kept` | 1 |" in card
    assert "poise quantize org/model --recipe mobile --to gguf" in card
    assert "at commit 0123456789ab;" in card
    assert "at commit" not in model_card(manifest(), PLAN, None)
    assert "Not evaluated yet: `poise evaluate <this folder> --reference org/model`" in card


def test_what_was_lost_is_told():
    card = model_card(manifest(), PLAN, COMPARISON)
    assert "Not evaluated yet" not in card
    for gate in GATES:
        *_, line = [line for line in card.splitlines() if line.startswith(f"| {gate.name} |")]
        assert gate.limit in line
        assert line.endswith(f"| {gate.verdict} |")
    assert "0.008 to 0.012" in card
    assert COMPARISON.command in card
    assert "nan" not in card
