"""What a terminal shows of a plan."""

import dataclasses
from io import StringIO

import pytest
from rich.console import Console

from poise.core.plan import Plan, PlanRow
from poise.reports.console import print_plan

ROW = PlanRow(
    name="q",
    role="attention.q",
    rows=64,
    columns=96,
    format="int(bits=2, group=32)",
    solver="rtn",
    activations=None,
    reason="recipe rule for role *",
)
PLAN = Plan(recipe="wish", exporter="gguf", rows=(ROW,))


def printed(**changes):
    out = StringIO()
    print_plan(Console(file=out, width=200), dataclasses.replace(PLAN, **changes))
    return out.getvalue()


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"transforms": ("equalize", "hadamard")}, "  before: equalize, hadamard"),
        ({"tune": "distill(steps=7)"}, "  afterwards: distill(steps=7)"),
        ({"untrained": "this has [4] weights"}, "  not trained: this has [4] weights"),
    ],
)
def test_what_a_plan_does_before_and_afterwards_is_shown_if_there_is_any(changes, line):
    assert line in printed(**changes).splitlines()
    assert line.split(":")[0] not in printed()
