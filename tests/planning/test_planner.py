"""Plans: the first matching rule, the first accepted option, and a reason for every matrix."""

import dataclasses

import pytest

from poise.core.errors import UsageError
from poise.core.linear import Linear
from poise.core.plan import Option, Plan, Recipe, Rule
from poise.planning.planner import check_plan, make_plan


def linear(name, role, **more):
    return Linear(
        **{"name": name, "role": role, "rows": 64, "columns": 96, "block": 0, "input_group": name, **more}
    )


LINEARS = [
    linear("embed", "embedding", block=None, tied=True),
    linear("q", "attention.q"),
    linear("up", "ffn.up"),
    linear("router", "router"),
]
INT4, INT8 = Option(format="int(bits=4, group=32)"), Option(format="int(bits=8, group=32)")


def recipe(*rules):
    return Recipe(name="test", description="", rules=rules)


def refuse_four_bits(linear, format, activations):
    return "no 4 bits here" if format.bits == 4 else None


def plan(*rules, accepts=lambda *_: None):
    return make_plan(recipe(*rules), LINEARS, "gguf", accepts, "float16")


def test_the_first_matching_rule_decides():
    made = plan(Rule(role="attention.*", options=(INT8,)), Rule(options=(INT4,)))
    assert [row.format for row in made.rows] == [
        "int(bits=4, group=32, scale='float16')",
        "int(bits=8, group=32, scale='float16')",
        "int(bits=4, group=32, scale='float16')",
        "int(bits=4, group=32, scale='float16')",
    ]


def test_a_tied_embedding_is_also_the_head():
    made = plan(Rule(role="head", options=(INT8,)), Rule(options=(INT4,)))
    assert made.row("embed").format == "int(bits=8, group=32, scale='float16')"


def test_options_are_tried_in_order_and_refusals_are_told():
    made = plan(Rule(options=(INT4, INT8)), accepts=refuse_four_bits)
    assert {row.format for row in made.rows} == {"int(bits=8, group=32, scale='float16')"}
    assert all("not int(bits=4, group=32): no 4 bits here" in row.reason for row in made.rows)


def test_what_no_option_fits_is_kept_with_the_reason():
    made = plan(Rule(options=(INT4,)), accepts=refuse_four_bits)
    assert all(row.kept and "no 4 bits here" in row.reason for row in made.rows)
    assert not made.quantized


def test_what_no_rule_names_is_kept():
    made = plan(Rule(role="ffn.*", options=(INT4,)))
    assert [row.name for row in made.rows if row.kept] == ["embed", "q", "router"]
    assert made.row("q").reason == "no rule of the recipe matches"


def test_a_rule_without_options_keeps():
    made = plan(Rule(role="router", options=()), Rule(options=(INT4,)))
    assert made.row("router").reason == "the recipe keeps it"


@pytest.mark.parametrize(
    "dead", [Rule(role="expert.*", options=(INT4,)), Rule(name="nothing.*", options=(INT4,))]
)
def test_a_rule_that_matches_nothing_is_an_error_unless_optional(dead):
    with pytest.raises(UsageError, match=r"rule 1 .* matches nothing"):
        plan(dead, Rule(options=(INT4,)))
    plan(Rule(role=dead.role, name=dead.name, options=dead.options, optional=True), Rule(options=(INT4,)))


def test_a_rule_behind_one_that_takes_all_is_an_error():
    with pytest.raises(UsageError, match="an earlier rule takes all"):
        plan(Rule(options=(INT4,)), Rule(role="ffn.*", options=(INT8,)))


@pytest.mark.parametrize(("most", "trained"), [(None, True), (4 * 64 * 96, True), (4 * 64 * 96 - 1, False)])
def test_a_model_of_more_weights_than_may_be_trained_is_not(most, trained):
    wish = dataclasses.replace(recipe(Rule(options=(INT4,))), tune="distill", tune_up_to=most)
    made = make_plan(wish, LINEARS, "gguf", lambda *_: None, "float16")
    assert made.tune == ("distill" if trained else None)
    assert (made.untrained is None) == trained


def test_a_plan_says_why_a_model_is_not_trained():
    wish = dataclasses.replace(recipe(Rule(options=(INT4,))), tune="distill", tune_up_to=4096)
    made = make_plan(wish, LINEARS, "gguf", lambda *_: None, "float16")
    assert made.untrained == "the recipe trains models of up to 4,096 weights, this has 24,576"
    assert Plan.from_json(made.to_json()).untrained == made.untrained
    calm = dataclasses.replace(wish, tune=None)
    assert make_plan(calm, LINEARS, "gguf", lambda *_: None, "float16").untrained is None


def test_plans_survive_json_and_hash_their_contents():
    made = plan(
        Rule(role="router", options=()),
        Rule(options=(Option(format="int(bits=4, group=32)", activations=8),)),
    )
    again = Plan.from_json(made.to_json())
    assert again == made
    assert again.hash == made.hash != plan(Rule(options=(INT8,))).hash


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"schema_version": 99, "rows": []}', '{"schema_version": 1, "rows": [{}]}']
)
def test_what_is_not_a_plan_is_refused(text):
    with pytest.raises(ValueError, match=r"."):
        Plan.from_json(text)


def test_a_plan_must_fit_model_and_exporter():
    made = plan(Rule(options=(INT4,)))
    assert check_plan(made, LINEARS, lambda *_: None, "float16") == made
    with pytest.raises(UsageError, match="router is only in the plan"):
        check_plan(made, LINEARS[:3], lambda *_: None, "float16")
    with pytest.raises(UsageError, match=r"embed: the plan asks for .*but no 4 bits here"):
        check_plan(made, LINEARS, refuse_four_bits, "float16")


def test_a_hand_written_plan_is_settled_like_a_recipe():
    made = plan(Rule(options=(INT4,)))
    by_hand = Plan.from_json(made.to_json().replace(", scale='float16'", ""))
    assert check_plan(by_hand, LINEARS, lambda *_: None, "float16") == made
