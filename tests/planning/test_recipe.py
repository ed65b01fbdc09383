"""Recipes: the shipped ones are valid, and mistakes are named with their place."""

import itertools

import pytest
import torch

from poise.core.errors import UsageError
from poise.planning import presets
from poise.planning.presets import PRESETS, preset_recipe
from poise.planning.recipe import load_recipe, shipped_recipes
from poise.training.distill import distill_of


def test_shipped_recipes_load():
    assert {"mobile", "edge", "cloud", "layer-types"} <= set(shipped_recipes())
    for name in shipped_recipes():
        recipe = load_recipe(name)
        assert recipe.name == name
        assert recipe.rules


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("description: x\nrules: []\ncolour: red", "colour.*unknown key"),
        (
            "description: x\nrules: [{role: head, optoins: ['int(bits=4, group=32)']}]",
            "rules.0.optoins.*did you mean 'options'",
        ),
        (
            "description: x\nrules: [{options: [{format: float, activation: 8}]}]",
            "did you mean 'activations'",
        ),
        ("description: x\nrules: [{options: ['int(bits=12, group=32)']}]", "rule 1: .*1 to 8 bits"),
        ("description: x\nrules: [{options: [nv5]}]", "no format named 'nv5'"),
        ("description: x\nrules: [{options: [float], solver: magic}]", "no solver named 'magic'"),
        ("description: x\nrules: [{role: head}]", "either options or keep"),
        ("description: x\nrules: [{keep: true, options: [float]}]", "either options or keep"),
        (
            "description: x\nrules: [{keep: true}]\ngates: {speed: 3}",
            "gates.speed: unknown gate; there is size_reduction",
        ),
        ("rules: []", "description"),
        ("[1, 2]", "valid dictionary"),
        ("a: b: c", "not YAML"),
    ],
)
def test_mistakes_are_named(tmp_path, text, message):
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    with pytest.raises(UsageError, match=f"(?s)mine.*{message}"):
        load_recipe(path)


def test_training_and_its_limit_are_read_from_a_file(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text(
        "description: d\nrules: [{options: ['int(bits=2, group=32)']}]\ntune: distill(steps=7)\ntune_up_to: 1000\ntokens: 5\n"
    )
    recipe = load_recipe(path)
    assert (recipe.tune, recipe.tune_up_to, recipe.tokens) == ("distill(steps=7)", 1000, 5)


def test_an_unknown_recipe_offers_the_nearest():
    with pytest.raises(UsageError, match="did you mean 'mobile'"):
        load_recipe("moblie")
    with pytest.raises(UsageError, match=r"gone\.yaml: cannot be read"):
        load_recipe("gone.yaml")


@pytest.mark.parametrize("quick", [False, True])
def test_best_trains_codes_where_levels_are_few_and_scales_everywhere(quick):
    rates = {
        bits: distill_of(str(preset_recipe("best", bits, quick=quick).tune)).code_rate
        for bits in (2, 3, 4, 8)
    }
    assert rates.pop(2) > 0
    assert set(rates.values()) == {0.0}


def test_balanced_trains_small_models_where_levels_are_few_and_time_allows():
    """Its promise is the memory of one block: nothing is trained whose size is not named."""
    for bits, quick in itertools.product((2, 3, 4), (False, True)):
        recipe = preset_recipe("balanced", bits, quick=quick)
        assert (recipe.tune is not None) == (bits == 2 and quick)
        assert (recipe.tune_up_to is not None) == (recipe.tune is not None)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_processors_that_multiply_bfloat16_do_more_of_the_same(bits):
    def trained(recipe):
        return distill_of(recipe.tune).tokens if recipe.tune else 0

    for name in PRESETS:
        slow, quick = (preset_recipe(name, bits, quick=quick) for quick in (False, True))
        assert {rule.solver for rule in slow.rules} == {rule.solver for rule in quick.rules}
        more = [quick.tokens > slow.tokens, trained(quick) > trained(slow)]
        assert quick.tokens >= slow.tokens
        assert trained(quick) >= trained(slow)
        assert any(more) == (name != "fast")


@pytest.mark.parametrize(("dtype", "quick"), [(torch.bfloat16, True), (torch.float32, False)])
def test_a_preset_asks_what_the_processor_multiplies(monkeypatch, dtype, quick):
    monkeypatch.setattr(presets, "product_dtype", lambda: dtype)
    assert preset_recipe("best", 3) == preset_recipe("best", 3, quick=quick)
    assert preset_recipe("best", 3) != preset_recipe("best", 3, quick=not quick)
