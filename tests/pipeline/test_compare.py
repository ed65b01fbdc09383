"""Candidates against an original: verdicts, what is refused, what is kept after an interruption."""

import json
import math
from itertools import pairwise

import numpy as np
import pytest
import torch

import poise
from conftest import build_model
from poise.calibration.text import Text, load_text
from poise.checkpoints import open_checkpoint
from poise.core.artifact import Artifact
from poise.core.errors import EngineError, UsageError
from poise.core.metric import Answer
from poise.core.verdict import FAIL, INCONCLUSIVE, PASS, Range
from poise.engines.torch import Torch
from poise.pipeline.samples import PROTOCOLS, Prompt, read_prompts, read_windows
from poise.pipeline.summary import Reading, Written, fidelity_scores, own_scores
from poise.planning.presets import preset_recipe
from poise.statistics.partition import Partition

ONLY = {"perplexity_ratio": Range(at_most=1.02)}


@pytest.fixture(scope="module")
def questions(tmp_path_factory):
    path = tmp_path_factory.mktemp("questions") / "questions.jsonl"
    lines = [{"question": f"what sat on mat {n}?", "answer": "the cat sat on the mat"} for n in range(3)]
    lines += [
        {"question": f"the cat sat on the {n}", "choices": ["mat", "cat", "other"], "answer": n % 3}
        for n in range(4)
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


@pytest.fixture(scope="module")
def ruined(model_factory, tmp_path_factory):
    """A copy with other weights."""
    from safetensors.torch import load_file, save_file

    folder = build_model(tmp_path_factory.mktemp("ruined") / "ruined", "llama", "bfloat16")
    tensors = load_file(folder / "model.safetensors")
    tensors["lm_head.weight"] = 30 * tensors["lm_head.weight"].roll(1, 0)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


def row(verdict, number=0):
    found = verdict.rows[number]
    return found, {finding.name: finding for finding in found.findings}


def test_a_model_passes_against_itself_and_a_ruined_one_fails(llama, ruined, questions, tmp_path):
    verdict = poise.compare(
        llama, [llama, ruined], prompts=[questions], windows=12, answer_tokens=8, out=tmp_path / "out"
    )
    same, findings = row(verdict)
    assert same.value("kl") == pytest.approx(0, abs=1e-7)
    assert findings["perplexity_ratio"].verdict == PASS
    assert findings["length_ratio"].verdict == PASS
    assert findings["accuracy_change"].value == 0
    assert findings["accuracy_change"].verdict == INCONCLUSIVE  # four questions show nothing
    assert same.verdict == INCONCLUSIVE
    assert same.value("identical") == 1
    assert same.value("flips") == 0
    assert same.value("relevance") == pytest.approx(relevance(llama), rel=1e-3)
    broken, findings = row(verdict, 1)
    assert findings["perplexity_ratio"].verdict == FAIL
    assert broken.verdict == verdict.verdict == FAIL
    assert "perplexity ratio" in broken.reason
    assert {part.name for part in broken.parts["position"]} == {"1 to 16", "17 to 64", "65 to 127"}
    assert {p.name for p in (tmp_path / "out").iterdir()} == {
        "cache",
        "verdict.json",
        "report.md",
        "report.html",
        "scores.jsonl",
    }
    lines = [json.loads(line) for line in (tmp_path / "out" / "scores.jsonl").read_text().splitlines()]
    assert len(lines) == 2 * (12 + 4 + 3)
    mine = [line["kl"] for line in lines if line["kind"] == "text" and line["candidate"] == broken.side.label]
    assert np.mean(mine) == pytest.approx(broken.value("kl"))


def test_answers_that_move_are_seen_where_their_mean_stays():
    """Two prompts whose answers change places: no metric of all answers differs, every single one has moved."""
    calm, wild = "a b c d e f g h i j", "a a a a a a a a a a"
    answers = [Answer(text=text, tokens=tuple(map(ord, text))) for text in (calm, wild)]
    prompts = [Prompt(document=str(n), domain="d", text="q", asked="q", wanted=None) for n in range(2)]
    written = Written(
        prompts=prompts, original=answers, candidate=answers[::-1], partition=Partition(["0", "1"])
    )
    before, after = (
        {score.name: score.value for score in own_scores(NOTHING, [], written, of)}
        for of in ("original", "candidate")
    )
    scores = {score.name: score for score in fidelity_scores(NOTHING, [], written, 0.0)}
    each = [len(set(pairwise(a.tokens))) / (len(a.tokens) - 1) for a in answers]
    assert before["distinct"] == after["distinct"] == pytest.approx(np.mean(each))
    assert scores["distinct_shift"].value == pytest.approx(abs(each[0] - each[1]))
    same = Written(prompts=prompts, original=answers, candidate=answers, partition=Partition(["0", "1"]))
    for score in fidelity_scores(NOTHING, [], same, 0.0):
        assert not score.name.endswith("_shift") or score.value in (0, pytest.approx(math.nan, nan_ok=True))


NOTHING = Reading(windows=[], records=[], partition=Partition([]))


def relevance(model):
    """Once more without the pipeline."""
    checkpoint = open_checkpoint(model)
    tokenizer = checkpoint.tokenizer()
    with Torch() as engine:
        engine.load(checkpoint)
        asked = [tokenizer(f"what sat on mat {n}?")["input_ids"] for n in range(3)]
        gains = []
        for number, before in enumerate(asked):
            made = engine.generate(before, 8, {tokenizer.eos_token_id}).tokens
            made = made[:-1] if made[-1] == tokenizer.eos_token_id else made
            scores = []
            for start in (before, asked[(number + 1) % 3]):
                q = engine.logits([*start, *made]).log_softmax(-1)[len(start) - 1 : -1]
                scores.append(float(q.gather(1, torch.tensor(made)[:, None]).mean()))
            gains.append(scores[0] - scores[1])
    return sum(gains) / len(gains)


def test_divergence_is_that_of_both_models_on_the_same_tokens(llama, ruined):
    """Once more without the pipeline, percentiles too."""
    verdict = poise.compare(llama, [ruined], windows=3, ranges=ONLY)
    text = load_text(None, "evaluation")
    windows = text.windows(open_checkpoint(llama).tokenizer(), 128, 3)
    with Torch() as a, Torch() as b:
        a.load(open_checkpoint(llama))
        b.load(open_checkpoint(ruined))
        p = torch.cat([a.logits(window)[:-1] for window in windows]).double().log_softmax(-1)
        q = torch.cat([b.logits(window)[:-1] for window in windows]).double().log_softmax(-1)
    kl = (p.exp() * (p - q)).sum(-1)
    found = verdict.rows[0]
    assert found.value("kl") == pytest.approx(float(kl.mean()), rel=1e-4)
    for name, share in (("kl_median", 0.5), ("kl_p99", 0.99), ("kl_max", 1.0)):
        assert found.value(name) == pytest.approx(float(kl.quantile(share)), rel=1e-4)
    following = torch.tensor([token for window in windows for token in window[1:]])
    nats = -q.gather(1, following[:, None]).sum()
    size = sum(len(open_checkpoint(llama).tokenizer().decode(w[1:]).encode()) for w in windows)
    assert found.value("bits_per_byte") == pytest.approx(float(nats) / math.log(2) / size, rel=1e-4)
    assert found.value("byte_perplexity") == pytest.approx(2 ** found.value("bits_per_byte"), rel=1e-6)
    words = sum(len(open_checkpoint(llama).tokenizer().decode(w[1:]).split()) for w in windows)
    assert math.log(found.value("word_perplexity")) == pytest.approx(float(nats) / words, rel=1e-4)
    assert found.value("kl_noise_floor") == 0


def test_an_interrupted_comparison_goes_on_and_ends_in_the_same_bytes(
    llama, ruined, questions, tmp_path, monkeypatch
):
    wish = {"prompts": [questions], "windows": 4, "answer_tokens": 6}
    poise.compare(llama, [ruined], out=tmp_path / "whole", **wish)
    whole, calls = Torch.logits, []

    def failing(self, tokens):
        calls.append(tokens)
        if len(calls) == 6:
            raise EngineError("the engine stopped in the middle")
        return whole(self, tokens)

    monkeypatch.setattr(Torch, "logits", failing)
    with pytest.raises(EngineError):
        poise.compare(llama, [ruined], out=tmp_path / "out", **wish)
    assert not (tmp_path / "out" / "verdict.json").exists()
    (cache,) = (tmp_path / "out" / "cache").glob("*.jsonl")
    assert len(cache.read_text().splitlines()) == 2
    with open(cache, "a") as file:
        file.write('["torn')  # killed while it wrote
    monkeypatch.setattr(Torch, "logits", whole)
    poise.compare(llama, [ruined], out=tmp_path / "out", **wish)
    for name in ("verdict.json", "report.html", "report.md", "scores.jsonl"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_what_is_known_loads_no_model(llama, ruined, questions, tmp_path, monkeypatch):
    wish = {"prompts": [questions], "windows": 3, "answer_tokens": 6, "out": tmp_path / "out"}
    first = poise.compare(llama, [ruined], **wish)
    monkeypatch.setattr(Torch, "load", lambda *_: pytest.fail("loads a model"))
    again = poise.compare(llama, [ruined], **wish)
    assert again == first or repr(again) == repr(first)


def test_other_tokenizers_leave_bits_per_byte_alone(llama, questions, tmp_path):
    other = build_model(tmp_path / "other", "llama", "bfloat16", vocab_size=400)
    verdict = poise.compare(llama, [other], windows=4, prompts=[questions], answer_tokens=6)
    (found,) = verdict.rows
    assert "only bits per byte" in found.notes[0]
    assert math.isnan(found.value("kl"))
    assert found.value("bits_per_byte") > 0
    assert verdict.original.scores[0].name == "bits_per_byte"
    assert found.verdict != PASS
    assert math.isfinite(found.value("surprise"))  # answers are read in the original's tokens


def test_a_text_that_the_candidate_was_calibrated_on_is_refused_unless_forced(llama, tmp_path):
    text = tmp_path / "known.txt"
    text.write_text(" ".join(f"the cat number {n} sat on the mat and slept" for n in range(300)))
    poise.quantize(
        llama,
        preset_recipe("balanced", 4, 32, quick=False),
        tmp_path / "cal",
        to="compressed-tensors",
        calibration=text,
    )
    with pytest.raises(UsageError, match="calibrated on"):
        poise.compare(llama, [tmp_path / "cal"], texts=[text], windows=2)
    verdict = poise.compare(llama, [tmp_path / "cal"], texts=[text], windows=2, force=True)
    assert verdict.rows[0].value("kl") >= 0
    assert "layer" in verdict.rows[0].parts
    card = (tmp_path / "cal" / "README.md").read_text()
    assert f"## {verdict.rows[0].verdict.upper()} against" in card
    assert "| kl |" in card
    assert Artifact.open(tmp_path / "cal").damaged() == []


def test_a_second_text_is_a_second_domain(llama, ruined, tmp_path):
    text = tmp_path / "novel.txt"
    text.write_text("the cat sat on the mat and then the other cat sat there too. " * 60)
    base = load_text(None, "evaluation")
    (tmp_path / "base.txt").write_text(base.content)
    verdict = poise.compare(llama, [ruined], texts=[tmp_path / "base.txt", text], windows=3)
    assert [part.name for part in verdict.rows[0].parts["domain"]] == ["base.txt", "novel.txt"]
    assert [item["samples"] for item in verdict.data] == [3, 3]


def test_latency_is_judged_in_the_same_engine_only(llama, ruined):
    verdict = poise.compare(llama, [ruined], windows=2, efficiency=True)
    assert "latency_ratio" in row(verdict)[1]
    other = poise.compare(llama, [ruined], windows=2, engines=["fake(vocabulary=320)"], efficiency=True)
    assert "latency_ratio" not in row(other)[1]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"protocol": "mine"}, "no protocol mine"),
        ({"engines": ["torch", "torch"]}, "1 candidates but 2 engines"),
        ({"texts": ["nothing.txt"]}, "nothing.txt"),
    ],
)
def test_wishes_that_make_no_sense(llama, change, message):
    with pytest.raises(UsageError, match=message):
        poise.compare(llama, [llama], windows=2, **change)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 2: not JSON"),
        ("[1]", "line 2: a list"),
        ('{"what": "a"}', "line 2: keys what"),
        ('{"question": "a", "choices": ["b"], "answer": 0}', "two texts at least"),
        ('{"question": "a", "choices": ["b", "c"], "answer": "d"}', "none of the 2 choices"),
        ('{"question": "a", "choices": ["b", "c"], "answer": 2}', "none of the 2 choices"),
    ],
)
def test_a_broken_line_is_named(llama, tmp_path, line, message):
    path = tmp_path / "q.jsonl"
    path.write_text('{"question": "a"}\n' + line + "\n")
    with pytest.raises(UsageError, match=message):
        read_prompts(path, open_checkpoint(llama).tokenizer())


def test_choices_are_told_by_number_letter_or_text(llama, tmp_path):
    path = tmp_path / "q.jsonl"
    path.write_text(
        "".join(
            json.dumps({"question": "a", "choices": ["b", "c"], "answer": x}) + "\n" for x in (1, "B", "c")
        )
    )
    assert [prompt.right for prompt in read_prompts(path, open_checkpoint(llama).tokenizer())] == [1, 1, 1]


def test_protocols_cut_as_their_tools_do(llama):
    """``llama-perplexity``: consecutive windows, the second half counts. GPTQ: one long text, every position."""
    tokenizer = open_checkpoint(llama).tokenizer()
    text = Text(name="t", content="the cat sat on the mat and then the other cat sat there too. " * 400)
    ids = tokenizer(text.content, add_special_tokens=False)["input_ids"]
    opening = tokenizer("")["input_ids"][:1]
    long = [*opening, *ids]
    cut = read_windows([text], tokenizer, PROTOCOLS["llamacpp"], None)
    assert [list(w.tokens[1:]) for w in cut] == [
        long[at + 1 : at + 512] for at in range(0, len(long) - 511, 512)
    ]
    assert {w.tokens[0] for w in cut} == (
        {opening[0]} if opening else {long[at] for at in range(0, len(long) - 511, 512)}
    )
    assert {w.first for w in cut} == {256}
    assert cut[0].text == tokenizer.decode(long[257:512])
    cut = read_windows([text], tokenizer, PROTOCOLS["gptq-2048"], 2)
    assert [list(w.tokens) for w in cut] == [long[:2048], long[2048:4096]]


def test_documents_of_json_lines_keep_their_windows_together(llama, tmp_path):
    path = tmp_path / "docs.jsonl"
    path.write_text("".join(json.dumps({"text": "the cat sat on the mat. " * n}) + "\n" for n in (30, 60)))
    tokenizer = open_checkpoint(llama).tokenizer()
    cut = read_windows([load_text(path, "evaluation", tokenizer)], tokenizer, PROTOCOLS["windows"], None)
    assert len({window.document for window in cut}) == 2


def test_a_new_metric_reads_again_what_was_scored_without_it(llama, ruined, tmp_path, monkeypatch):
    from poise.metrics.top1 import Top1
    from poise.pipeline import scoring

    wish = {"windows": 2, "ranges": ONLY, "out": tmp_path / "out"}
    poise.compare(llama, [ruined], **wish)
    known = scoring.names
    monkeypatch.setattr(scoring, "names", lambda kind: [*known(kind), "mine"])
    found = scoring.get
    monkeypatch.setattr(scoring, "get", lambda kind, name: Top1 if name == "mine" else found(kind, name))
    (row,) = poise.compare(llama, [ruined], **wish).rows
    assert row.value("mine") == row.value("top1")


def test_a_figure_that_was_asked_for_and_is_not_there_is_not_passed(llama):
    wishes = {"kl": Range(at_most=0.05), "bleu_change": Range(at_least=-1)}
    verdict = poise.compare(llama, [llama], windows=12, ranges=wishes)
    (found,) = verdict.rows
    verdicts = {finding.name: finding.verdict for finding in found.findings}
    assert "--gate 'kl<=0.05'" in verdict.facts["command"]
    assert verdicts == {"kl": PASS, "perplexity_ratio": PASS, "bleu_change": INCONCLUSIVE}
    assert found.verdict == INCONCLUSIVE
    assert found.reason == "bleu change was asked for and not measured"


def test_prompts_without_a_wanted_answer_are_no_part_of_what_needs_one(llama, tmp_path):
    path = tmp_path / "q.jsonl"
    lines = [{"question": f"what {n}?"} | ({"answer": "the cat"} if n % 2 else {}) for n in range(4)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    (found,) = poise.compare(llama, [llama], windows=2, prompts=[path], answer_tokens=4).rows
    bleu = next(finding for finding in found.findings if finding.name == "bleu_change")
    assert (bleu.n, bleu.verdict) == (2, PASS)
