"""From a file to chosen windows, and from these to a calibration."""

import json
import sys

import pytest

import poise
from poise.core.errors import MissingExtra, UsageError
from poise.pipeline import choose


@pytest.fixture
def corpus(tmp_path):
    """Many lines of one kind, few of another, and one twice."""
    usual = [f"the cat sat on the mat and then the other cat number {n} sat there too" for n in range(60)]
    rare = ["0123456789 " * 12, "ZZZZ QQQQ XXXX " * 8]
    path = tmp_path / "corpus.jsonl"
    path.write_text("\n".join(json.dumps({"text": text}) for text in [*usual, *rare, *rare]))
    return path


def test_what_is_chosen_can_be_calibrated_on(llama, corpus, tmp_path):
    out = tmp_path / "chosen.jsonl"
    found = choose(llama, corpus, out, windows=6, length=48)
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert len(lines) == len(found.texts) == 6
    assert all({"text", "source", "window", "reason"} == set(line) for line in lines)
    assert [line["window"] for line in lines] == sorted(line["window"] for line in lines)
    assert found.chosen.largest <= found.random.largest
    assert any("0123" in text or "ZZZZ" in text for text in found.texts)
    poise.quantize(llama, "mobile", tmp_path / "small", calibration=out)


def test_too_little_text_is_refused(llama, corpus, tmp_path):
    with pytest.raises(UsageError, match="500 are wanted"):
        choose(llama, corpus, tmp_path / "out.jsonl", windows=500, length=48)
    assert not (tmp_path / "out.jsonl").exists()


def test_a_domain_is_preferred(llama, corpus, tmp_path):
    domain = tmp_path / "domain.txt"
    domain.write_text("9876543210 " * 30)
    found = choose(llama, corpus, windows=2, length=48, domain=domain)
    assert any("0123" in text for text in found.texts)


GERMAN = "Der Hund schläft im Garten und die Katze sitzt nebenan auf der Bank, Nummer"


def test_only_the_languages_that_are_asked_for_compete(llama, corpus, tmp_path):
    """Rare texts cover most, so they would be chosen; in another language they are left out, and counted."""
    with open(corpus, "a") as file:
        file.writelines("\n" + json.dumps({"text": f"{GERMAN} {n}"}) for n in range(9))
    one, both = (
        choose(llama, corpus, windows=6, length=48, language=languages)
        for languages in (["en"], ["en", "de"])
    )
    assert "de" in one.foreign
    assert "de" not in both.foreign
    assert not any("Hund" in text for text in one.texts)
    assert any("Hund" in text for text in both.texts)
    with pytest.raises(UsageError, match=r"windows in de, 100 are wanted; others are in .*en \("):
        choose(llama, corpus, windows=100, length=16, language=["de"])


def test_a_language_that_is_not_known_and_a_library_that_is_not_there(llama, corpus, monkeypatch):
    with pytest.raises(UsageError, match=r"got german: there is .*de"):
        choose(llama, corpus, windows=6, length=48, language=["german"])
    monkeypatch.setitem(sys.modules, "py3langid", None)
    with pytest.raises(MissingExtra, match=r"poise\[language\]"):
        choose(llama, corpus, windows=6, length=48, language=["en"])
