"""Judges: what they answer, what they refuse, and whether anybody may hear them."""

import importlib
import json
import math

import numpy as np
import pytest

import poise
from poise.checkpoints import open_checkpoint
from poise.checkpoints.rounded import Rounded
from poise.core.errors import EngineError
from poise.core.judge import Judge, preference
from poise.core.metric import Answer
from poise.core.verdict import Range
from poise.endpoints.client import Client
from poise.engines.torch import Torch
from poise.judges.endpoint import Endpoint
from poise.judges.local import Local
from poise.pipeline.cache import Cache
from poise.pipeline.judging import at_equal_length, controls, judge_answers, judged_question
from poise.pipeline.progress import silent
from poise.pipeline.samples import Prompt
from poise.statistics.partition import Partition
from serving import serving

module = importlib.import_module("poise.pipeline.compare")  # the package has a function of this name
PROMPTS = [Prompt(document=str(n), domain="d", text=f"q{n}", asked=f"q{n}", wanted=None) for n in range(20)]
ALONE = Partition([prompt.document for prompt in PROMPTS])


class Rule(Judge):
    """Prefers by a rule on both texts."""

    name = "rule"

    def __init__(self, rule):
        self.rule, self.calls = rule, 0

    def prefers_first(self, request, first, second):
        self.calls += 1
        return self.rule(first, second)


def answers(text):
    return [Answer(text=f"{text} {n}", tokens=(n,)) for n in range(20)]


def compared(judge, before, after, cache=None):
    return judge_answers(judge, PROMPTS, before, after, cache or Cache(None, {}), silent)


def honest(first, second):
    return {(False, True): 0.9, (True, False): 0.1}.get(("bad" in first, "bad" in second), 0.6)


def test_an_honest_judge_with_a_habit_is_heard():
    """It likes what comes first a little; both orders take that out."""
    judge = Rule(honest)
    itself, damaged = (
        compared(judge, answers("ok"), answers("ok")),
        compared(judge, answers("ok"), answers("bad")),
    )
    assert controls(itself, damaged, ALONE) == []
    assert np.allclose(itself.preference, 0.5)
    assert np.allclose(itself.first, 0.6)
    assert np.allclose(damaged.preference, 0.1)
    assert damaged.consistent.mean() == 1


@pytest.mark.parametrize(
    ("rule", "complaint"),
    [
        (lambda first, second: 1.0, "does not see"),
        (lambda first, second: 0.5, "does not see"),
        (lambda first, second: math.nan, "no answer to 20 of 20"),
        (lambda first, second: 0.9 if "bad" in first else 0.1, "does not see"),
    ],
)
def test_a_judge_that_sees_nothing_is_not_heard(rule, complaint):
    judge = Rule(rule)
    itself, damaged = (
        compared(judge, answers("ok"), answers("ok")),
        compared(judge, answers("ok"), answers("bad")),
    )
    assert any(complaint in line for line in controls(itself, damaged, ALONE))


def test_a_taste_for_length_is_taken_out():
    generator = np.random.default_rng(0)
    d = generator.normal(0.3, 0.4, 500)
    p = 0.5 + 0.2 * d + generator.normal(0, 0.01, 500)
    sums = np.array([p.sum(), d.sum(), (p * d).sum(), (d * d).sum(), 500])
    assert p.mean() > 0.55
    assert at_equal_length(sums) == pytest.approx(0.5, abs=0.003)
    same = np.array([p.sum(), 0, 0, 0, 500])
    assert at_equal_length(same) == pytest.approx(p.mean())


def test_what_was_judged_is_not_asked_again():
    judge, cache = Rule(honest), Cache(None, {})
    compared(judge, answers("ok"), answers("bad"), cache)
    calls = judge.calls
    compared(judge, answers("ok"), answers("bad"), cache)
    assert judge.calls == calls == 40


def test_the_win_rate_is_a_question_with_its_range():
    found = compared(Rule(honest), answers("ok"), answers("bad"))
    question = judged_question(found, ALONE, Range(at_least=0.45))
    assert question.estimate.value == pytest.approx(0.1, abs=0.01)


def test_labels_without_weight_are_no_answer():
    assert preference(0.3, 0.1) == pytest.approx(0.75)
    assert math.isnan(preference(0.01, 0.02))


@pytest.fixture
def endpoint():
    """A server that answers what the test puts into it."""
    from starlette.responses import Response
    from starlette.routing import Route

    replies, seen = [], []

    async def answer(request):
        seen.append((json.loads(await request.body()), request.headers.get("authorization")))
        status, content = replies.pop(0) if len(replies) > 1 else replies[0]
        return Response(content if isinstance(content, str) else json.dumps(content), status_code=status)

    with serving([Route("/v1/chat/completions", answer, methods=["POST"])]) as address:
        yield f"{address}/v1", replies, seen


def likely(**chances):
    listed = [{"token": token, "logprob": math.log(chance)} for token, chance in chances.items()]
    return {"choices": [{"message": {"content": "A"}, "logprobs": {"content": [{"top_logprobs": listed}]}}]}


def test_an_endpoint_is_read_by_its_probabilities(endpoint):
    url, replies, seen = endpoint
    replies.append((200, likely(**{"A": 0.5, " A": 0.1, "B": 0.2, "The": 0.1})))
    assert Endpoint(Client(url, "m", "secret")).prefers_first("q", "x", "y") == pytest.approx(0.75)
    body, key = seen[0]
    assert (body["model"], body["max_tokens"], body["temperature"], key) == ("m", 1, 0, "Bearer secret")
    assert body["messages"][0]["content"].index("x") < body["messages"][0]["content"].index("y")


@pytest.mark.parametrize(("said", "expected"), [("A", 1.0), (" b. ", 0.0), ("Both are nice", None)])
def test_without_probabilities_a_letter_counts_and_nonsense_does_not(endpoint, said, expected):
    url, replies, _ = endpoint
    replies.append((200, {"choices": [{"message": {"content": said}}]}))
    found = Endpoint(Client(url, "m")).prefers_first("q", "x", "y")
    assert math.isnan(found) if expected is None else found == expected


def test_an_endpoint_that_is_busy_is_asked_again(endpoint):
    url, replies, seen = endpoint
    replies += [(503, ""), (429, ""), (200, likely(A=0.9, B=0.1))]
    assert Endpoint(Client(url, "m", wait=0.01)).prefers_first("q", "x", "y") == pytest.approx(0.9)
    assert len(seen) == 3


@pytest.mark.parametrize("reply", [(404, "no such model"), (200, "<html>"), (200, {"error": "x"}), (500, "")])
def test_an_endpoint_that_does_not_work_is_an_error(endpoint, reply):
    url, replies, _ = endpoint
    replies.append(reply)
    with pytest.raises(EngineError, match="m at http"):
        Endpoint(Client(url, "m", wait=0.01)).prefers_first("q", "x", "y")


def test_nobody_there():
    with pytest.raises(EngineError, match="after 4 tries"):
        Endpoint(Client("http://127.0.0.1:9/v1", "m", wait=0.01)).prefers_first("q", "x", "y")


def test_a_local_judge_reads_both_labels(llama):
    checkpoint = open_checkpoint(llama)
    with Torch() as engine:
        engine.load(checkpoint)
        judge = Local("tiny", lambda: engine, checkpoint.tokenizer())
        engine.logits = lambda tokens: scores(checkpoint.tokenizer(), len(tokens))
        assert judge.prefers_first("a", "b", "c") == pytest.approx(0.75, abs=1e-3)


def scores(tokenizer, n):
    import torch

    found = torch.full((n, 320), -30.0)
    for label, chance in (("A", 0.75), ("B", 0.25)):
        found[-1, tokenizer(label, add_special_tokens=False)["input_ids"][-1]] = math.log(chance)
    return found


def test_the_damaged_control_is_the_original_rounded(llama):
    import torch

    whole, damaged = (
        open_checkpoint(llama),
        Rounded(open_checkpoint(llama), "int(bits=2, group=64, symmetric=False)"),
    )
    name = "model.layers.0.mlp.up_proj.weight"
    assert len(torch.unique(damaged.read(name)[0, :64])) <= 4
    assert torch.equal(damaged.read("lm_head.weight"), whole.read("lm_head.weight"))
    assert damaged.fingerprint() != whole.fingerprint()


@pytest.fixture
def questions(tmp_path):
    path = tmp_path / "q.jsonl"
    path.write_text("".join(json.dumps({"question": f"what sat on {n}?"}) + "\n" for n in range(6)))
    return path


def test_a_comparison_hears_a_judge_that_passes_and_no_other(llama, questions, monkeypatch):
    first = poise.compare(llama, [llama], prompts=[questions], windows=2, answer_tokens=6)
    known = {answer.original for answer in first.rows[0].answers}
    wish = {"prompts": [questions], "windows": 2, "answer_tokens": 6, "judge": "some"}
    fair = Rule(lambda a, b: 0.5 if (a in known) == (b in known) else 0.95 if a in known else 0.05)
    monkeypatch.setattr(module, "_judge", lambda *_: fair)
    row = poise.compare(llama, [llama], **wish).rows[0]
    assert row.value("judged_win_rate") == pytest.approx(0.5)
    assert row.value("judged_damaged") == pytest.approx(0.05, abs=0.2)
    assert any(finding.name == "judged_win_rate" and finding.verdict == "pass" for finding in row.findings)
    monkeypatch.setattr(module, "_judge", lambda *_: Rule(lambda a, b: 1.0))
    row = poise.compare(llama, [llama], **wish).rows[0]
    assert math.isnan(row.value("judged_win_rate"))
    assert "no judged verdict" in row.notes[0]
    assert not any(finding.name == "judged_win_rate" for finding in row.findings)
