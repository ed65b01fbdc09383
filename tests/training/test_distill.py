"""Distillation: exact gradients, codes that stay, and a divergence that falls on text that was held back."""

import copy
import dataclasses
from pathlib import Path

import pytest
import torch

from poise.checkpoints import open_checkpoint
from poise.core import precision, slabs
from poise.core.errors import PoiseError, UsageError
from poise.core.precision import product_dtype, products
from poise.core.registry import build, get
from poise.training import _codes, distill
from poise.training._codes import LearnedWeight
from poise.training.distill import (
    Distill,
    _attach,
    _Divergence,
    _error,
    _Lesson,
    _states,
    answers,
    distill_of,
)

SPECS = [
    "int(bits=4, group=32)",
    "int(bits=4, group=32, symmetric=False)",
    "int(bits=4, group=32, symmetric=False, zero='minimum')",
    "nf(bits=4, group=32)",
]
FINE = 4
"""Their sixteen levels learn at a quarter of the given rates."""


def text(seed, count=24, length=48):
    dice = torch.Generator().manual_seed(seed)
    return torch.randint(3, 320, (count, length), generator=dice).tolist()


def sixteen(*, scale_rate=5e-3, norm_rate=5e-4, code_rate=0.0, **settings):
    """A training in which sixteen levels learn at these rates."""
    rates = {"scale_rate": scale_rate, "norm_rate": norm_rate, "code_rate": code_rate}
    return Distill(batch=192, **settings, **{key: FINE * rate for key, rate in rates.items()})


@pytest.fixture
def pair(model_factory):
    """The tiny Llama as a trainable model, and what it says to the text."""
    with get("engine", "torch")(dtype="float32") as engine:
        engine.load(open_checkpoint(model_factory("llama")))
        model = engine.model
        with torch.no_grad():  # random weights this small would predict every token alike
            for value in model.parameters():
                if value.dim() == 2:
                    value.mul_(6)
        yield model, answers(model, text(0), lambda *_: None)


def quantized(model, spec):
    format = build("format", spec).resolve("float16")
    return {
        name: build("solver", "rtn").solve(value.detach(), format)
        for name, value in model.named_parameters()
        if value.dim() == 2 and "layers" in name
    }


def spoiled(weight):
    """Every third scale a fifth too large."""
    scale = weight.params["scale"].clone()
    scale.view(-1)[::3] *= 1.2
    return dataclasses.replace(weight, params={**weight.params, "scale": scale})


@pytest.mark.parametrize(("positions", "logits"), [(256, 1 << 20), (16, 800), (10, 149), (1, 1)])
def test_the_divergence_and_its_gradient_are_those_of_autograd(positions, logits, monkeypatch):
    monkeypatch.setattr(distill, "POSITIONS", positions)
    monkeypatch.setattr(distill, "LOGITS", logits)
    dice = torch.Generator().manual_seed(0)
    states, wanted = torch.randn(37, 8, generator=dice), torch.randn(37, 8, generator=dice)
    head, original = torch.randn(50, 8, generator=dice), torch.randn(50, 8, generator=dice)
    states.requires_grad_(True)
    found = _Divergence.apply(states, wanted, head, original)
    found.backward()
    gradient, states.grad = states.grad, None
    theirs = torch.log_softmax(wanted @ original.T, -1)
    ours = torch.log_softmax(states @ head.T, -1)
    expected = (theirs.exp() * (theirs - ours)).sum(-1).mean()
    expected.backward()
    assert torch.allclose(found, expected, rtol=1e-5)
    assert torch.allclose(gradient, states.grad, atol=1e-6)


def test_answers_are_taught_among_the_words_of_the_windows_and_judged_among_all(pair, monkeypatch):
    model, _ = pair
    monkeypatch.setattr(distill, "WORDS", 50)
    ids = torch.tensor(text(0, count=4)) % 20
    original = answers(model, ids.tolist(), lambda *_: None)
    student = copy.deepcopy(model)
    with torch.no_grad():
        student.model.norm.weight.mul_(1.1)
        student.get_output_embeddings().weight[51:100].mul_(2)  # no taught words
    lesson = _Lesson(student, original, ids, 0.0)
    seen = set(ids.flatten().tolist()) | set(range(0, len(original.head), 50))
    assert lesson.words.tolist() == sorted(seen)

    def among(words):
        with torch.no_grad(), products():
            states = student.base_model(ids[:2]).last_hidden_state.float()
        ours = torch.log_softmax(states @ lesson.head[words].float().T, -1)
        theirs = torch.log_softmax(original.states[:2].float() @ original.head[words].float().T, -1)
        return float((theirs.exp() * (theirs - ours)).sum(-1).mean())

    everything = torch.arange(len(original.head))
    assert float(lesson.loss([0, 1]).detach()) == pytest.approx(among(lesson.words), rel=0.05)
    assert lesson.judge([0, 1], 2) == pytest.approx(among(everything), rel=0.05)
    assert among(everything) > 1.1 * among(lesson.words)  # neither passes for the other


@pytest.mark.parametrize("spec", SPECS)
def test_the_attached_weight_is_the_decoded_one_and_passes_gradients(pair, spec):
    model, _ = pair
    name = "model.layers.0.mlp.down_proj.weight"
    weight = quantized(model, spec)[name]
    part = _attach(model, name, weight, transposed=False)
    module = model.get_submodule(name.removesuffix(".weight"))
    assert torch.allclose(module.weight.float(), weight.decode(), rtol=2e-2, atol=4e-3)
    for value in part.linear.values():
        value.requires_grad_(True)
    probe = torch.randn(weight.shape, generator=torch.Generator().manual_seed(1))
    (module.weight.float() * probe).sum().backward()
    for key, basis in weight.format.basis(weight.codes, weight.params).items():
        expected = (basis * probe).view(len(basis), -1, 32).sum(-1)
        assert torch.allclose(
            part.linear[key].grad, expected, rtol=0.05, atol=0.05 * float(expected.abs().max())
        )


@pytest.mark.parametrize("spec", SPECS)
def test_tuning_mends_spoiled_scales_and_keeps_the_codes(pair, spec):
    model, original = pair
    weights = {name: spoiled(weight) for name, weight in quantized(model, spec).items()}
    seen = []
    tuned = sixteen(steps=30, every=10).run(
        model, original, weights, frozenset(), text(0), lambda *facts: seen.append(facts)
    )
    assert tuned.after < 0.7 * tuned.before
    assert [facts[0] for facts in seen] == list(range(1, 31))
    held = [facts[3] for facts in seen]
    assert held[0] == tuned.before
    assert len(set(held)) == 4  # before, and after 10, 20 and 30 steps
    assert held[9] == held[18] != held[8]
    for name, weight in tuned.weights.items():
        assert torch.equal(weight.codes, weights[name].codes)
        assert {key: value.dtype for key, value in weight.params.items()} == {
            key: value.dtype for key, value in weights[name].params.items()
        }
    assert any(
        not torch.equal(w.params["scale"], weights[n].params["scale"]) for n, w in tuned.weights.items()
    )


@pytest.mark.parametrize("spec", [*SPECS, "q4_k"])
def test_learned_codes_begin_as_they_are_and_pass_gradients(spec, monkeypatch):
    monkeypatch.setattr(slabs, "WEIGHTS", 512)  # several threads
    dice = torch.Generator().manual_seed(2)
    original, probe = (torch.randn(8, 256, generator=dice) for _ in range(2))
    format = build("format", spec).resolve("float16")
    weight = build("solver", "rtn").solve(original, format)
    codes = weight.codes.clone()
    codes[:, :250:5] = weight.codes[:, 1:251:5]  # codes that are not the nearest
    weight = dataclasses.replace(weight, codes=codes)
    part = LearnedWeight(original, weight, transposed=True)
    assert torch.equal(part.result().codes, codes)
    for value in part.parameters():
        value.requires_grad_(True)
    got = part(torch.empty(0)).T
    assert torch.equal(got, weight.decode().to(torch.bfloat16).to(product_dtype()))
    (got.float() * probe).sum().backward()
    for key, basis in format.basis(codes, weight.params).items():
        span = format.span_of(key, 256)
        expected = (basis * probe.to(torch.bfloat16).float()).view(8, -1, span).sum(-1)
        assert torch.allclose(part.linear[key].grad, expected, rtol=1e-3, atol=1e-3)
    ladder = format.ladder(weight.params, 8, 256).sort(-1).values.repeat_interleave(format.group_of(256), 1)
    gaps = ladder.diff(dim=-1)
    low = part.places.detach().floor().clamp(0, gaps.shape[-1] - 1).long()
    inside = (part.places >= -0.5) & (part.places < gaps.shape[-1] + 0.5)
    expected = probe * gaps.gather(2, low.unsqueeze(2)).squeeze(2) * inside
    assert torch.allclose(part.places.grad, expected, rtol=0.02, atol=1e-4)


def test_learned_codes_find_back_from_spoiled_ones(pair):
    """A tenth of the codes is moved by one; scales alone cannot mend that."""
    model, original = pair
    weights = quantized(model, SPECS[1])
    dice = torch.Generator().manual_seed(5)
    for name, weight in weights.items():
        moved = torch.rand(weight.codes.shape, generator=dice) < 0.1
        codes = torch.where(moved, (weight.codes.int() ^ 1).to(weight.codes.dtype), weight.codes)
        weights[name] = dataclasses.replace(weight, codes=codes)
    fresh, found = copy.deepcopy(model), []
    for student, rate in ((model, 0.0), (fresh, 0.02)):
        recipe = sixteen(steps=40, every=10, scale_rate=1e-2, norm_rate=1e-3, code_rate=rate)
        found.append(recipe.run(student, original, weights, frozenset(), text(0), lambda *_: None))
    frozen, learned = found
    assert abs(frozen.before - learned.before) < 0.02 * frozen.before
    assert learned.after < 0.8 * frozen.after
    changed = [(w.codes != weights[n].codes).float().mean() for n, w in learned.weights.items()]
    assert 0.001 < torch.stack(changed).mean() < 0.5


@pytest.mark.parametrize("code_rate", [0.0, 0.005])
def test_processors_without_bfloat16_train_in_float32_to_the_same_end(pair, code_rate, monkeypatch):
    model, _ = pair
    found = []
    for dtype in (torch.float32, torch.bfloat16):
        for module in (precision, distill, _codes):
            monkeypatch.setattr(module, "product_dtype", lambda dtype=dtype: dtype)
        student = copy.deepcopy(model)
        original = answers(student, text(0), lambda *_: None)
        assert original.states.dtype == original.head.dtype == dtype
        weights = {name: spoiled(weight) for name, weight in quantized(student, SPECS[1]).items()}
        recipe = sixteen(steps=30, every=10, code_rate=code_rate)
        found.append(recipe.run(student, original, weights, frozenset(), text(0), lambda *_: None))
    single, half = found
    assert single.before == pytest.approx(half.before, rel=0.02)
    assert single.after == pytest.approx(half.after, rel=0.05)
    assert single.after < 0.9 * single.before


def test_the_error_of_hidden_states_is_a_share_of_their_square():
    wanted = torch.randn(3, 4, 5, 16, generator=torch.Generator().manual_seed(0))
    off = [block * (1 + 0.1 * number) for number, block in enumerate(wanted, 1)]
    assert torch.allclose(_error(off, wanted), torch.tensor((0.01 + 0.04 + 0.09) / 3), rtol=1e-4)


def test_a_token_counts_for_as_much_as_its_hidden_state_is_long():
    """One of 512 tokens, two hundred times as long as the others, as the first one of a window is."""
    wanted = torch.nn.functional.normalize(
        torch.randn(1, 2, 512, 16, generator=torch.Generator().manual_seed(0)), dim=-1
    )
    wanted[:, :, 0] *= 200
    lost, other = wanted[0].clone(), wanted[0].clone()
    lost[:, 0] = 0
    other[:, 1] = 0
    assert float(_error([lost], wanted)) == pytest.approx(200 / 711, rel=1e-4)
    assert float(_error([other], wanted)) == pytest.approx(1 / 711, rel=1e-4)


def test_hidden_states_that_are_taught_come_nearer_to_the_original(pair, monkeypatch, tmp_path):
    monkeypatch.setattr(distill, "TAUGHT", 1)  # the tiny model has two blocks
    model, plain = pair
    assert plain.inner is None
    taught = answers(model, text(0), lambda *_: None, hidden=tmp_path / "hidden")
    assert taught.inner.shape == (24, 1, 48, model.config.hidden_size)
    with torch.no_grad(), products():
        expected = model.base_model(torch.tensor(text(0)[3:4]), output_hidden_states=True).hidden_states[1]
    assert torch.equal(taught.inner[3, 0], expected[0].to(torch.bfloat16))
    weights = {name: spoiled(weight) for name, weight in quantized(model, SPECS[0]).items()}
    errors = []
    for original, hidden in ((plain, 0.0), (taught, 10.0)):
        student = copy.deepcopy(model)
        recipe = sixteen(steps=30, every=10, hidden=hidden)
        tuned = recipe.run(student, original, weights, frozenset(), text(0), lambda *_: None)
        assert tuned.after < 0.9 * tuned.before
        with torch.no_grad():
            inner = _states(student, torch.tensor(text(0)[-2:]), hidden=True)[1]
            errors.append(float(_error(inner, taught.inner[-2:].transpose(0, 1))))
    assert errors[1] < 0.9 * errors[0]


def test_a_model_of_few_blocks_is_taught_its_answers_alone(pair, tmp_path):
    model, _ = pair
    assert answers(model, text(0), lambda *_: None, hidden=tmp_path / "hidden").inner is None


def test_interrupted_training_goes_on_to_the_same_result(pair, tmp_path):
    model, original = pair
    weights = {name: spoiled(weight) for name, weight in quantized(model, SPECS[1]).items()}
    recipe = sixteen(steps=9, every=3, scale_rate=1.5e-3, code_rate=0.01)
    other, fresh, steps = copy.deepcopy(model), copy.deepcopy(model), []
    whole = recipe.run(copy.deepcopy(model), original, weights, frozenset(), text(0), lambda *_: None)

    def killed(step, *_):
        if step == 6:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        recipe.run(model, original, weights, frozenset(), text(0), killed, tmp_path / "state")
    resumed = recipe.run(
        other,
        original,
        weights,
        frozenset(),
        text(0),
        lambda step, *_: steps.append(step),
        tmp_path / "state",
    )
    assert steps == [7, 8, 9]
    again = recipe.run(
        fresh,
        original,
        weights,
        frozenset(),
        text(0),
        lambda step, *_: steps.append(step),
        tmp_path / "state",
    )
    assert steps == [7, 8, 9]  # killed before its result was kept, finished training is not done again
    assert again.after == resumed.after
    assert (resumed.before, resumed.after, resumed.steps) == (whole.before, whole.after, whole.steps)
    for name, weight in resumed.weights.items():
        assert torch.equal(weight.codes, whole.weights[name].codes)
        assert torch.equal(weight.params["scale"], whole.weights[name].params["scale"])
    assert all(torch.equal(resumed.norms[name], value) for name, value in whole.norms.items())


@pytest.mark.parametrize(("bits", "share"), [(2, 1), (3, 1), (4, 1 / 4), (5, 1 / 16)])
def test_fine_grids_learn_more_slowly_and_norms_as_the_coarsest(pair, bits, share):
    model, _ = pair
    model.requires_grad_(False)
    (fine, weight), (coarse, other) = list(quantized(model, f"int(bits={bits}, group=32)").items())[:2]
    other = quantized(model, "int(bits=4, group=32)")[coarse]
    parts = [_attach(model, fine, weight, False, True), _attach(model, coarse, other, False, True)]
    rates = [group["lr"] for group in Distill(code_rate=1.0)._groups([torch.full((8,), 2.0)], parts)]
    size = [float(part.linear["scale"].square().mean().sqrt()) for part in parts]
    expected = [2e-3 * max(share, 1 / 4), 3e-3 * share * size[0], 3e-3 / 4 * size[1], share, 1 / 4]
    assert rates == pytest.approx(expected)


def test_training_that_only_hurts_is_given_up(pair):
    model, original = pair
    weights = quantized(model, SPECS[1])
    norms = {name: value.detach().clone() for name, value in model.named_parameters() if value.dim() == 1}
    wild = sixteen(steps=4, every=2, scale_rate=25.0, norm_rate=25.0)
    tuned = wild.run(model, original, weights, frozenset(), text(0), lambda *_: None)
    assert tuned.after == tuned.before
    assert tuned.steps == 0
    for name, weight in tuned.weights.items():
        assert torch.equal(weight.params["scale"], weights[name].params["scale"])
    assert all(torch.equal(tuned.norms[name], value) for name, value in norms.items())


def test_equal_seeds_give_equal_results(model_factory):
    found = []
    for _ in range(2):
        with get("engine", "torch")(dtype="float32") as engine:
            engine.load(open_checkpoint(model_factory("llama")))
            weights = quantized(engine.model, SPECS[0])
            original = answers(engine.model, text(0), lambda *_: None)
            found.append(
                Distill(steps=3, batch=96, every=1).run(
                    engine.model, original, weights, frozenset(), text(0), lambda *_: None
                )
            )
    assert found[0].after == found[1].after
    for name, weight in found[0].weights.items():
        assert torch.equal(weight.params["scale"], found[1].weights[name].params["scale"])


def test_a_single_window_is_refused(pair):
    model, original = pair
    with pytest.raises(PoiseError, match="too few"):
        Distill().run(model, original, {}, frozenset(), text(0, 1), lambda *_: None)


def test_specs():
    assert distill_of("distill(steps=7)").steps == 7
    with pytest.raises(UsageError, match="distill"):
        distill_of("lora")
    with pytest.raises(UsageError, match="stepz"):
        distill_of("distill(stepz=7)")


def test_the_page_on_plans_names_every_setting_with_its_default():
    page = (Path(__file__).parents[2] / "docs/concepts/plan.md").read_text(encoding="utf-8")
    table = [line.split("|")[1:3] for line in page.splitlines() if line.startswith("| `")]
    named = {
        name.strip(" `"): float(value)
        for names, values in table
        if values.strip()[:1].isdigit()
        for name, value in zip(names.split(","), values.split(","), strict=True)
    }
    assert named == {field.name: field.default for field in dataclasses.fields(Distill)}
