"""poise compare, report and vote as scripts and people use them."""

import json

import pytest

FEW = ("--windows", "2", "--answer-tokens", "6")


@pytest.fixture
def questions(tmp_path):
    path = tmp_path / "questions.jsonl"
    path.write_text("".join(json.dumps({"question": f"what sat on mat {n}?"}) + "\n" for n in range(3)))
    return path


@pytest.mark.parametrize(
    ("gates", "code", "verdict"),
    [
        (("perplexity_ratio<=1.02",), 0, "pass"),
        (("perplexity_ratio<=1.02", "kl<=-1"), 3, "fail"),
        (("perplexity_ratio<=1.02", "judged_win_rate>=0.4"), 4, "inconclusive"),
    ],
)
def test_the_exit_code_is_the_verdict(run, llama, tmp_path, gates, code, verdict):
    wish = [word for gate in gates for word in ("--gate", gate)]
    found, out, _ = run("compare", llama, llama, *FEW, *wish, "-o", tmp_path / "out", "--json")
    assert (found, json.loads(out)["verdict"]) == (code, verdict)
    assert json.loads((tmp_path / "out" / "verdict.json").read_text()) == json.loads(out)


def test_the_table_names_every_candidate_with_its_reason(run, llama, tmp_path):
    code, out, _ = run("compare", llama, llama, llama, *FEW, "-o", tmp_path / "out")
    assert code == 0
    assert out.count("PASS") >= 2
    assert "(2)" in out  # two of one name are told apart
    assert str(tmp_path) not in (tmp_path / "out" / "report.md").read_text()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--gate", "kl"), "--gate kl: write"),
        (("--gate", "kl=3"), "--gate kl=3: write"),
        (("--protocol", "mine"), "no protocol mine"),
        (("--human",), "--human needs --prompts"),
        (("--engine", "torch", "--engine", "torch"), "1 candidates but 2 engines"),
    ],
)
def test_wishes_that_cannot_be_met(run, llama, tmp_path, options, message):
    code, _, err = run("compare", llama, llama, *options, "-o", tmp_path / "out")
    assert code == 2 or code == 1
    assert message in err
    assert not (tmp_path / "out").exists()


def test_people_can_vote_at_once_or_later(run, llama, model_factory, questions, tmp_path, monkeypatch):
    served = []
    monkeypatch.setattr("poise.pipeline.vote.serve_vote", lambda folder, *_: served.append(folder))
    code, _, err = run(
        "compare",
        llama,
        model_factory("qwen3"),
        *FEW,
        "--prompts",
        questions,
        "--human",
        "-o",
        tmp_path / "out",
    )
    assert served == [tmp_path / "out"]
    assert "Vote on http://127.0.0.1:8321/" in err
    assert code == 0
    code, _, _ = run("vote", tmp_path / "out", "--results")
    assert code == 0


def test_a_report_is_written_again_from_its_json(run, llama, tmp_path):
    run("compare", llama, llama, *FEW, "-o", tmp_path / "out")
    before = (tmp_path / "out" / "report.html").read_bytes()
    (tmp_path / "out" / "report.html").unlink()
    code, _, _ = run("report", tmp_path / "out")
    assert code == 0
    assert (tmp_path / "out" / "report.html").read_bytes() == before


def test_without_a_terminal_progress_is_a_line_now_and_then(run, llama, tmp_path, monkeypatch):
    _, _, quiet = run("compare", llama, llama, *FEW, "-o", tmp_path / "quiet")
    assert quiet == ""
    monkeypatch.setattr("poise.cli.terminal.EVERY", 0.0)
    _, out, told = run("compare", llama, llama, *FEW, "-o", tmp_path / "out", "--json")
    assert json.loads(out)["verdict"] == "pass"
    assert "100%" in told
    assert all(line.endswith("%") for line in told.splitlines())
