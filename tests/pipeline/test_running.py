"""Candidates that run elsewhere: what they are asked, what is kept when they stop, what is not claimed of them."""

import asyncio
import json
import math
import re

import pytest

import poise
from poise.core.errors import EngineError, UsageError
from poise.core.verdict import INCONCLUSIVE, Range
from poise.endpoints.client import Client
from poise.pipeline.cache import Cache
from poise.pipeline.progress import silent
from poise.pipeline.running import GENERATED, ROUNDS, STREAMS, ask, speed
from poise.pipeline.samples import Prompt
from serving import serving

TURNS = (("system", "be brief"), ("user", "hello"))


@pytest.fixture
def questions(tmp_path):
    path = tmp_path / "questions.jsonl"
    lines = [{"question": f"what sat on mat {n}?", "answer": "the cat"} for n in range(3)]
    lines.append({"question": "the cat sat on", "choices": ["mat", "cat"], "answer": 0})
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


class Stub:
    """Says the last word of what it is asked; ``broken`` requests are answered with an error."""

    def __init__(self):
        self.seen, self.broken, self.models, self.busy, self.most = [], set(), ["stub"], 0, 0

    def routes(self):
        from starlette.responses import JSONResponse, StreamingResponse
        from starlette.routing import Route

        async def models(_):
            return JSONResponse({"data": [{"id": name} for name in self.models]})

        async def chat(request):
            body = await request.json()
            self.seen.append(body)
            if body.get("stream"):
                return StreamingResponse(self.pieces(), media_type="text/event-stream")
            text = body["messages"][-1]["content"].split()[-1]
            return JSONResponse({"choices": [{"message": {"content": text}, "finish_reason": "stop"}]})

        async def complete(request):
            body = await request.json()
            self.seen.append(body)
            if len(self.seen) in self.broken:
                return JSONResponse({"error": "gone"}, status_code=400)
            return JSONResponse({"choices": [{"text": " the cat", "finish_reason": "length"}]})

        return [
            Route("/v1/models", models),
            Route("/v1/chat/completions", chat, methods=["POST"]),
            Route("/v1/completions", complete, methods=["POST"]),
        ]

    async def pieces(self):
        self.busy += 1
        self.most = max(self.most, self.busy)
        yield 'data: {"choices": [{"delta": {"role": "assistant"}}]}\n\n'
        for _ in range(4):
            await asyncio.sleep(0.005)
            yield 'data: {"choices": [{"delta": {"content": "x"}}]}\n\n'
        yield 'data: {"choices": [], "usage": {"completion_tokens": 7}}\n\n'
        yield "data: [DONE]\n\n"
        self.busy -= 1


@pytest.fixture
def stub():
    found = Stub()
    with serving(found.routes()) as address:
        found.url = f"{address}/v1"
        yield found


def test_an_endpoint_is_compared_by_its_answers_and_nothing_else(llama, questions, stub):
    wish = {"prompts": [questions], "windows": 3, "answer_tokens": 6}
    verdict = poise.compare(llama, [stub.url, llama], **wish, ranges={"kl": Range(at_most=0.05)})
    there, here = verdict.rows
    assert there.side.label == f"stub at {stub.url}"
    assert [body["prompt"] for body in stub.seen] == [f"what sat on mat {n}?" for n in range(3)]
    assert {(body["max_tokens"], body["temperature"], body["model"]) for body in stub.seen} == {
        (6, 0, "stub")
    }
    assert there.side.value("rouge1") == pytest.approx(100)
    assert all(answer.candidate == " the cat" for answer in there.answers)
    assert math.isnan(there.value("kl"))
    assert math.isnan(there.side.value("accuracy"))
    assert "only its answers" in there.notes[0]
    findings = {finding.name: finding for finding in there.findings}
    assert findings["kl"].verdict == INCONCLUSIVE
    assert "perplexity_ratio" not in findings
    assert here.value("kl") == pytest.approx(0, abs=1e-7)
    assert verdict.original.value("perplexity") > 1  # the other candidate was compared by it


def test_an_endpoint_that_stops_in_the_middle_is_asked_for_the_rest_only(llama, questions, stub, tmp_path):
    wish = {"prompts": [questions], "windows": 2, "answer_tokens": 6, "out": tmp_path / "out"}
    stub.broken = {3}
    with pytest.raises(EngineError, match="status 400"):
        poise.compare(llama, [stub.url], **wish)
    stub.broken, stub.seen = set(), []
    verdict = poise.compare(llama, [stub.url], **wish)
    assert [body["prompt"] for body in stub.seen] == ["what sat on mat 2?"]
    assert len(verdict.rows[0].answers) == 3
    for name in ("report.html", "report.md"):
        assert not re.search(r"\bnan\b", (tmp_path / "out" / name).read_text(), re.IGNORECASE)


def test_a_conversation_is_sent_as_turns(stub):
    prompt = Prompt(document="d", domain="d", text="<templated>", asked="hello", wanted=None, turns=TURNS)
    (answer,) = ask(Client(stub.url), [prompt], tokenizer, 5, Cache(None, {}), silent)
    assert stub.seen[0]["messages"] == [dict(zip(("role", "content"), turn, strict=True)) for turn in TURNS]
    assert (answer.text, answer.tokens, answer.ended) == ("hello", (5,), True)


def tokenizer(text, **_):
    return {"input_ids": [len(text)]}


def test_speed_is_of_as_many_users_as_it_says(stub):
    scores = {score.name: score for score in speed(Client(stub.url))}
    assert set(scores) == {"time_to_first_token", "throughput", "throughput_at_4", "throughput_at_16"}
    assert len(stub.seen) == sum(STREAMS) * (ROUNDS + 1)
    assert len({body["messages"][0]["content"] for body in stub.seen}) == len(stub.seen)
    assert {body["max_tokens"] for body in stub.seen} == {GENERATED}
    assert 4 < stub.most <= 16
    assert scores["time_to_first_token"].low >= 0.004
    assert scores["throughput"].high <= 7 / 0.02  # 7 tokens by the endpoint's count, not the 4 pieces
    assert scores["throughput"].value > 4 / 0.2
    assert scores["throughput_at_16"].value > 2 * scores["throughput"].value


def test_a_name_is_needed_where_there_are_several(stub):
    stub.models = ["a", "b"]
    with pytest.raises(EngineError, match=r"serves a, b; name one: .*#NAME"):
        Client(stub.url)
    assert Client(f"{stub.url}#b").model == "b"


def test_the_original_has_to_be_loaded(llama, stub):
    with pytest.raises(UsageError, match="original has to be"):
        poise.compare(stub.url, [llama])


def test_a_server_of_llama_cpp_answers_as_the_file_does(llama, questions, tmp_path):
    xllamacpp = pytest.importorskip("xllamacpp")
    (artifact,) = poise.quantize(llama, "float16", tmp_path / "f16")
    params = xllamacpp.CommonParams()
    params.model.path, params.n_ctx, params.port, params.warmup = str(artifact.model), 512, 0, False
    server = xllamacpp.Server(params)
    wish = {"prompts": [questions], "windows": 2, "answer_tokens": 8}
    verdict = poise.compare(llama, [artifact.model, f"{server.listening_address}/v1"], **wish)
    here, there = verdict.rows
    seen = [re.sub(r"\[PAD\d+\]", "", answer.candidate) for answer in here.answers]  # a server hides them
    assert [answer.candidate for answer in there.answers] == seen
    assert all(map(len, seen))
