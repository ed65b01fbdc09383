"""JSON lines: every known shape, and errors that say where."""

import json

import pytest

from poise.calibration.text import load_text
from poise.core.errors import UsageError


class Chatty:
    """A tokenizer whose template writes roles in brackets."""

    chat_template = "yes"

    def apply_chat_template(self, turns, tokenize):
        assert not tokenize
        if turns[0]["role"] == "assistant":
            raise ValueError("the user begins")
        return "".join(f"[{turn['role']}] {turn['content']}" for turn in turns)


def load(tmp_path, *lines, tokenizer=None):
    path = tmp_path / "calibration.jsonl"
    path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines))
    return load_text(path, "calibration", tokenizer or Chatty()).content


def test_every_known_shape(tmp_path):
    turns = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "good day"}]
    shared = [{"from": "human", "value": "hello"}, {"from": "gpt", "value": "good day"}]
    chat = "[user] hello[assistant] good day"
    found = load(
        tmp_path,
        '"a string"',
        {"text": "a text"},
        {"content": "a content", "id": 3},
        "",
        {"messages": turns},
        {"conversations": shared},
        {"prompt": "hello", "completion": "good day"},
        {"instruction": "hello", "output": "good day"},
    )
    assert found.split("\n\n") == ["a string", "a text", "a content", chat, chat, chat, chat]


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("{broken", "line 2: not JSON"),
        ("[1, 2]", "line 2: a list"),
        ({"body": "x", "name": "y"}, "line 2: keys body, name; known are text"),
        ({"messages": []}, "line 2: a conversation is a list"),
        ({"messages": [{"role": "user"}]}, "line 2: turn 1 lacks"),
        (
            {"messages": [{"role": "assistant", "content": "x"}]},
            "line 2: the chat template refuses it .the user begins",
        ),
        ({"conversations": [{"from": "stranger", "value": "x"}]}, "line 2: turn 1 lacks"),
    ],
)
def test_what_is_wrong_is_said_with_file_and_line(tmp_path, line, said):
    with pytest.raises(UsageError, match=rf"calibration\.jsonl, {said}"):
        load(tmp_path, {"text": "fine"}, line)


def test_a_conversation_needs_a_template(tmp_path):
    with pytest.raises(UsageError, match="no chat template"):
        load(tmp_path, {"prompt": "a", "completion": "b"}, tokenizer=object())


def test_text_that_is_not_utf8_is_refused_with_its_line(tmp_path):
    path = tmp_path / "latin.txt"
    path.write_bytes(b"one\ntwo\nthr\xe9e\n")
    with pytest.raises(UsageError, match=r"line 3, byte 11"):
        load_text(path, "calibration")
    path.write_text(" \n ")
    with pytest.raises(UsageError, match="is empty"):
        load_text(path, "calibration")
