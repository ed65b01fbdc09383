"""The page of a verdict, in a browser: without network or scripts, accessible, nothing lost on the way through JSON."""

import math
import shutil
from dataclasses import replace

import pytest

from poise.core.comparison import Side
from poise.core.metric import Score
from poise.core.verdict import FAIL, INCONCLUSIVE, PASS, Answered, Finding, Part, Range, Row, Verdict
from poise.reports.frontier import best_under, marks
from poise.reports.html import alike, bar, differences, report_html
from poise.reports.verdict import read_verdict, report_markdown, verdict_json, write_verdict

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


def score(name, value, unit="nats", half=0.1):
    return Score(
        name=name,
        value=value,
        low=value - half,
        high=value + half,
        unit=unit,
        protocol=f"{name} protocol",
        n=9,
    )


def side(label, megabytes):
    scores = (
        score("perplexity", 20.0, "perplexity"),
        Score(name="size", value=1e6 * megabytes, unit="bytes", protocol="p"),
    )
    return Side(label=label, source=label, engine="torch", fingerprint="f" * 64, scores=scores)


def finding(name, value, verdict, more=None):
    return Finding(
        name=name,
        value=value,
        low=value - 0.01,
        high=value + 0.01,
        allowed=Range(at_most=1.02),
        verdict=verdict,
        reason=f"{name} is {value} <for> a reason",
        n=9,
        documents=3,
        detectable=1.05,
        more=more,
    )


def row(label, megabytes, kl, verdict, more=None):
    return Row(
        side=side(label, megabytes),
        scores=(score("kl", kl), score("top1", 0.9, "share")),
        findings=(finding("perplexity_ratio", {PASS: 1.0, FAIL: 1.3}.get(verdict, 1.02), verdict, more),),
        parts={
            "domain": (Part(name="novels", value=kl), Part(name="code & more", value=2 * kl)),
            "layer": (Part(name="model.layers.0.mlp.up_proj.weight", value=0.03),),
        },
        answers=(
            Answered(prompt="Why <b>?", wanted="Because.", original="so it is", candidate="so it <i>was"),
        ),
        notes=("a note",),
    )


@pytest.fixture
def verdict():
    return Verdict(
        original=side("original", 270),
        rows=(
            row("eight", 140, 0.01, PASS),
            row("four", 80, 0.2, INCONCLUSIVE, more=40),
            row("wasteful", 100, 0.5, FAIL),
        ),
        data=({"kind": "text", "name": "novels.txt", "samples": 9, "documents": 3, "hash": "a" * 64},),
        facts={
            "command": "poise compare a b",
            "versions": {"poise": "1"},
            "seed": 0,
            "protocol": "windows",
            "answer_tokens": 8,
        },
    )


def test_the_worst_candidate_decides(verdict):
    assert verdict.verdict == FAIL
    assert replace(verdict, rows=verdict.rows[:2]).verdict == INCONCLUSIVE
    assert replace(verdict, rows=verdict.rows[:1]).verdict == PASS
    assert replace(verdict.rows[0], findings=()).verdict == INCONCLUSIVE


def test_the_front_leaves_out_what_another_beats_in_both(verdict):
    found = marks(verdict)
    assert [(mark.label, mark.best) for mark in found] == [
        ("four", True),
        ("wasteful", False),
        ("eight", True),
    ]
    assert [(size, mark.label) for size, mark in best_under(found)] == [(80, "four"), (140, "eight")]


def test_json_holds_all_of_it(verdict, tmp_path):
    lost = replace(verdict.rows[0], scores=(Score(name="kl", value=math.nan, unit="nats", protocol="p"),))
    verdict = replace(verdict, rows=(lost, *verdict.rows[1:]))
    write_verdict(verdict, tmp_path)
    again = read_verdict(tmp_path / "verdict.json")
    assert verdict_json(again) == verdict_json(verdict)
    assert report_html(again) == (tmp_path / "report.html").read_text()
    assert report_markdown(again) == (tmp_path / "report.md").read_text()


def test_words_that_differ_are_marked_and_nothing_is_markup(verdict):
    left, right = differences("the <b> cat sat", "the <b> dog sat")
    assert left == "the &lt;b&gt; <del>cat</del> sat"
    assert right == "the &lt;b&gt; <ins>dog</ins> sat"
    page = report_html(verdict)
    assert "<i>was" not in page
    assert "Why <b>" not in page


def test_neighbours_with_overlapping_intervals_are_named(verdict):
    close = replace(
        verdict, rows=(row("a", 10, 0.20, PASS), row("b", 11, 0.25, PASS), row("c", 12, 0.9, FAIL))
    )
    assert dict(alike(close))["kl"] == [("a", "b")]


def test_the_small_picture_has_its_range_where_the_figures_have_it():
    place = bar(finding("x", 1.0, PASS))
    assert place["low"] < place["value"] < place["high"] < place["outside"] < 100
    assert bar(replace(finding("x", 1.0, PASS), low=math.nan)) is None


@pytest.fixture(scope="module")
def browser():
    if CHROMIUM is None:
        pytest.skip("no chromium on this machine")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as play:
        opened = play.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield opened
        opened.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1200, 390])
def test_in_a_browser(verdict, tmp_path, browser, scheme, width):
    from axe_playwright_python.sync_playwright import Axe

    write_verdict(verdict, tmp_path)
    context = browser.new_context(
        color_scheme=scheme, viewport={"width": width, "height": 800}, bypass_csp=True
    )
    page = context.new_page()
    said, asked = [], []
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.on("request", lambda request: asked.append(request.url))
    page.goto((tmp_path / "report.html").as_uri())
    assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
    for details in page.query_selector_all("details"):
        details.evaluate("element => element.open = true")
    results = Axe().run(page)
    assert results.violations_count == 0, results.generate_report()
    assert said == []
    assert [url for url in asked if not url.startswith(("file:", "data:"))] == []
    context.close()


def test_without_scripts_everything_is_there(verdict, tmp_path, browser):
    write_verdict(verdict, tmp_path)
    context = browser.new_context(java_script_enabled=False)
    page = context.new_page()
    page.goto((tmp_path / "report.html").as_uri())
    assert page.locator("svg.chart").count() == 5
    assert page.get_by_role("row", name="wasteful").first.is_visible()
    page.keyboard.press("Tab")
    page.get_by_text("The picture as a table").first.click()
    assert page.get_by_role("columnheader", name="front").is_visible()
    context.close()


def test_pictures_have_names_and_tables(verdict, tmp_path, browser):
    write_verdict(verdict, tmp_path)
    page = browser.new_page()
    page.goto((tmp_path / "report.html").as_uri())
    charts = page.locator("svg.chart")
    for number in range(charts.count()):
        figure = charts.nth(number).locator("xpath=ancestor::figure")
        assert charts.nth(number).get_attribute("aria-labelledby")
        assert figure.locator("xpath=following::details[1]//table").count() >= 1
    page.close()


def test_figures_on_data_sets_of_the_hub_are_written_as_the_hub_reads_them(verdict):
    import yaml

    from poise.reports.card import eval_results

    assert eval_results(verdict, verdict.rows[0]) is None
    data = ({**verdict.data[0], "name": "hf://org/novels"},)
    part = Part(name="hf://org/novels", value=0.25)
    row = replace(verdict.rows[0], parts={"domain": (part,)})
    (entry,) = yaml.safe_load(eval_results(replace(verdict, data=data), row))
    assert entry["dataset"] == {"id": "org/novels", "task_id": "kl_divergence"}
    assert entry["value"] == 0.25
