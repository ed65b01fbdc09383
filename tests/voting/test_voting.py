"""A blind vote: what the page shows when, what is kept, what it comes to."""

import json
import shutil
import threading
import time

import pytest

from poise.core.comparison import Side
from poise.core.errors import UsageError
from poise.core.verdict import Verdict
from poise.pipeline.vote import tally, voting
from poise.reports.verdict import verdict_json
from poise.statistics.bradley_terry import Vote, strengths
from poise.voting.ballots import Poll, read_pairs

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


@pytest.fixture
def folder(tmp_path):
    """A comparison of an original with two candidates on four prompts; on the last one all say the same."""
    lines = [
        {
            "candidate": candidate,
            "kind": "answer",
            "sample": f"s{n}",
            "document": f"d{n}",
            "prompt": f"Question {n}?",
            "original": f"good answer {n}",
            "answer": f"good answer {n}" if n == 3 else f"{flaw} answer {n}",
        }
        for candidate, flaw in (("model-four", "fair"), ("model-two", "garbled"))
        for n in range(4)
    ]
    (tmp_path / "scores.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    original = Side(label="model-original", source="o", engine="torch", fingerprint="f", scores=())
    (tmp_path / "verdict.json").write_text(
        verdict_json(Verdict(original=original, rows=(), data=(), facts={}))
    )
    return tmp_path


def poll(folder, seed=0):
    return Poll(read_pairs(folder, "model-original"), folder / "votes.jsonl", seed)


def test_answers_that_do_not_differ_are_not_asked_about(folder):
    assert len(read_pairs(folder, "model-original")) == 6


def test_sides_are_drawn_for_every_voter(folder):
    asked = poll(folder)
    lefts = [ballot.names[0] for voter in map(str, range(40)) if (ballot := asked.next(voter))]
    assert 8 < lefts.count("model-original") < 32
    assert asked.next("a") == poll(folder).next("a")


def test_votes_are_kept_at_once_and_once(folder):
    asked = poll(folder)
    ballot = asked.next("me")
    asked.vote("me", ballot.key, "left")
    asked.vote("me", ballot.key, "right")
    with open(folder / "votes.jsonl", "a") as file:
        file.write('{"torn')
    again = poll(folder)
    assert [vote["choice"] for vote in again.votes] == ["left"]
    assert again.left("me") == 5
    assert again.next("me").key != ballot.key
    assert again.left("you") == 6


def test_a_vote_on_nothing_is_refused(folder):
    with pytest.raises(UsageError, match="no such ballot"):
        poll(folder).vote("me", "x", "left")
    asked = poll(folder)
    with pytest.raises(UsageError, match="choose one of"):
        asked.vote("me", asked.next("me").key, "both")


def test_a_folder_without_answers_says_what_to_do(tmp_path):
    (tmp_path / "scores.jsonl").write_text('{"kind": "text"}\n')
    with pytest.raises(UsageError, match="--prompts"):
        read_pairs(tmp_path, "o")


def test_strengths_of_one_pair_are_its_share_of_wins():
    """Closed form: with a prior of half a tie, (wins + 1/4) / (votes + 1/2)."""
    votes = [Vote(first="a", second="base", score=float(n < 30), document=str(n)) for n in range(40)]
    (found,) = strengths(votes, "base")
    assert found.value == pytest.approx(30.25 / 40.5, rel=1e-6)
    assert found.low < 0.75 < found.high
    assert found.votes == 40


def test_strengths_are_transitive_and_do_not_care_who_is_first():
    votes = [Vote(first="a", second="base", score=0.75, document="1")] * 400
    votes += [Vote(first="b", second="a", score=0.75, document="2")] * 400
    a, b = strengths(votes, "base")
    assert a.value == pytest.approx(0.75, abs=0.001)
    assert b.value == pytest.approx(0.9, abs=0.001)  # odds of 3 x 3
    turned = [Vote(first=v.second, second=v.first, score=1 - v.score, document=v.document) for v in votes]
    assert [x.value for x in strengths(turned, "base")] == pytest.approx([a.value, b.value])


def test_a_model_that_always_wins_has_a_finite_strength():
    (found,) = strengths(
        [Vote(first="a", second="base", score=1.0, document=str(n)) for n in range(9)], "base"
    )
    assert 0.9 < found.value < 1


@pytest.fixture
def address(folder):
    import uvicorn

    server = uvicorn.Server(uvicorn.Config(voting(folder), port=0, log_level="error"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.02)
    yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    server.should_exit = True
    thread.join()


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium on this machine")
def test_a_blind_session_by_clicking(folder, address):
    """The better text is chosen six times; nothing on the page tells the models before."""
    from axe_playwright_python.sync_playwright import Axe
    from playwright.sync_api import sync_playwright

    with sync_playwright() as play:
        browser = play.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        context = browser.new_context(bypass_csp=True)
        page = context.new_page()
        said = []
        page.on("console", lambda message: said.append(message.text))
        page.goto(address)
        for number in range(6):
            assert "model-" not in page.content()
            assert f"{6 - number} to go" in page.content()
            if number == 0:
                results = Axe().run(page)
                assert results.violations_count == 0, results.generate_report()
            left = page.get_by_role("region", name="Left").inner_text()
            page.get_by_role("button", name="Left" if "good" in left else "Right").click()
            assert "model-original" in page.content()
            page.get_by_role("link", name="Next" if number < 5 else "Results").click()
        assert "Results of 6 votes" in page.content()
        assert page.get_by_role("row", name="model-two").is_visible()
        assert said == []
        browser.close()
    found = {row.name: row for row in tally(folder)}
    assert set(found) == {"model-four", "model-two"}
    assert all(row.value < 0.2 and row.votes == 3 for row in found.values())


def test_the_server_refuses_nonsense(address):
    import httpx2

    assert httpx2.post(f"{address}/vote", content="ballot=x&choice=left").status_code == 400
    assert httpx2.post(f"{address}/vote", content="a" * 9000).status_code == 413
    assert httpx2.get(f"{address}/nothing").status_code == 404
