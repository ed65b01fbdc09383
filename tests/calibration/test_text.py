"""Texts and how they are cut."""

import hashlib

import pytest

from poise.calibration.text import Text, load_text
from poise.core.errors import UsageError


class Letters:
    """A tokenizer of one token a character, with an opening token or without."""

    def __init__(self, opening=()):
        self.opening = list(opening)

    def __call__(self, text, add_special_tokens=True, verbose=True):
        return {"input_ids": [*(self.opening if add_special_tokens else ()), *map(ord, text)]}


def text(content):
    return Text(name="t", content=content)


@pytest.mark.parametrize("opening", [(), (7,)])
@pytest.mark.parametrize("count", [8, 9, 15, 16, 17, 40, 41])
def test_windows_are_exact_and_follow_one_another(opening, count):
    content = "".join(chr(100 + i) for i in range(count))
    windows = text(content).windows(Letters(opening), 8)
    assert {len(window) for window in windows} == {8}
    assert all(window[: len(opening)] == list(opening) for window in windows)
    read = [token for window in windows for token in window[len(opening) :]]
    assert read == [ord(c) for c in content][: len(read)]
    assert count - len(read) < 8 - len(opening), "a whole window was dropped"


def test_a_closing_token_is_not_an_opening():
    windows = text("abcdef").windows(Letters((1, 2)), 4)
    assert windows == [[1, *map(ord, "abc")], [1, *map(ord, "def")]]


def test_a_short_text_is_one_short_window():
    assert text("abc").windows(Letters((1,)), 64) == [[1, *map(ord, "abc")]]


def test_the_limit_keeps_the_first_windows():
    whole = text("a" * 50 + "b" * 50).windows(Letters(), 10)
    assert text("a" * 50 + "b" * 50).windows(Letters(), 10, 3) == whole[:3]
    assert text("ab").windows(Letters(), 10, 3) == [[97, 98]]


@pytest.mark.parametrize("content", ["", "a"])
def test_too_little_text_is_refused(content):
    with pytest.raises(UsageError, match=f"t: {len(content)} tokens are too few"):
        text(content).windows(Letters((1,)), 8)


@pytest.mark.parametrize(("opening", "length"), [((), 1), ((1,), 2)])
def test_a_window_too_short_to_predict_anything_is_refused(opening, length):
    with pytest.raises(UsageError, match=f"windows of {length} tokens are too short"):
        text("abcdef").windows(Letters(opening), length)


def test_a_real_tokenizer_gives_the_same_tokens(llama):
    from poise.checkpoints import open_checkpoint

    tokenizer = open_checkpoint(llama).tokenizer()
    source = load_text(None, "evaluation")
    whole = tokenizer(source.content, add_special_tokens=False)["input_ids"]
    windows = source.windows(tokenizer, 32)
    assert [token for window in windows for token in window] == whole[: 32 * (len(whole) // 32)]


def test_the_hash_is_of_the_content_alone(tmp_path):
    (tmp_path / "a.txt").write_text("naïve", encoding="utf-8")
    (tmp_path / "b.txt").write_text("naïve", encoding="utf-8")
    a, b = load_text(tmp_path / "a.txt", "evaluation"), load_text(tmp_path / "b.txt", "calibration")
    assert a.name == "a.txt"
    assert a.hash == b.hash == hashlib.sha256("naïve".encode()).hexdigest()
    assert Text(name="a", content="naive").hash != a.hash


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"abc\xff", r"t\.txt: not UTF-8 text \(line 1, byte 3\)"),
        (b"", r"t\.txt: is empty"),
        (b" \n\t\n", r"t\.txt: is empty"),
        (None, r"t\.txt: cannot be read \(No such file or directory\)"),
    ],
)
def test_files_that_are_no_text_are_refused(tmp_path, content, message):
    if content is not None:
        (tmp_path / "t.txt").write_bytes(content)
    with pytest.raises(UsageError, match=message):
        load_text(tmp_path / "t.txt", "evaluation")
    with pytest.raises(UsageError, match="cannot be read"):
        load_text(tmp_path, "evaluation")


def test_the_built_in_texts_share_no_sentence():
    def sentences(purpose):
        content = load_text(None, purpose).content
        return {part.strip() for line in content.splitlines() for part in line.split(". ") if part.strip()}

    calibration, evaluation = sentences("calibration"), sentences("evaluation")
    assert len(calibration) > 30
    assert len(evaluation) > 30
    assert not calibration & evaluation
    assert load_text(None, "calibration").hash != load_text(None, "evaluation").hash
