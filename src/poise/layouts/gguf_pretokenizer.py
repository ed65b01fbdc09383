r"""How byte-level tokenizers cut text into words, by the names that llama.cpp has for it.

A ``tokenizer.json`` describes the cutting as a list of steps; a GGUF file holds a name instead. The table
below is read in both directions: the writer looks a list of steps up, the reader builds the steps.

Steps are ``split:REGEX`` (each match is a word), ``digits`` (each digit is a word), ``bytes`` (bytes as
printable characters) and ``words`` (the same after cutting by GPT-2's regex).

Two differences are passed over, as llama.cpp's own converter does. Unicode normalization to NFC: llama.cpp
has none, and text is in NFC nearly always. ``gpt-4o`` and ``tekken``: llama.cpp's expressions for them leave
combining marks out of words, which matters for scripts that need them (Hindi, Thai).
"""

from collections.abc import Mapping
from typing import Any

from poise.core.errors import ExportError

_TAIL = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_ENDINGS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_WORD = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_CASED = [rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}{a}{_LOWER}{b}" for a, b in (("*", "+"), ("+", "*"))]
_SLASHED = r" ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"

LLAMA3 = rf"{_ENDINGS}|{_WORD}|\p{{N}}{{1,3}}|{_TAIL}"
QWEN2 = rf"{_ENDINGS}|{_WORD}|\p{{N}}|{_TAIL}"
QWEN35 = (
    _ENDINGS + r"|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}"
    r"| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
GPT4O = rf"{_CASED[0]}{_ENDINGS}?|{_CASED[1]}{_ENDINGS}?|\p{{N}}{{1,3}}|{_SLASHED}"
TEKKEN = rf"{_CASED[0]}|{_CASED[1]}|\p{{N}}|{_SLASHED}"

Steps = tuple[str, ...]

NAMES: dict[tuple[Steps, bool], str] = {
    (("words",), False): "gpt-2",
    (("digits", "words"), False): "smollm",
    ((f"split:{LLAMA3}", "bytes"), True): "llama-bpe",
    ((f"split:{LLAMA3}", "bytes"), False): "dbrx",
    ((f"split:{QWEN2}", "bytes"), False): "qwen2",
    ((f"split:{QWEN35}", "bytes"), False): "qwen35",
    ((f"split:{GPT4O}", "bytes"), False): "gpt-4o",
    ((f"split:{TEKKEN}", "bytes"), True): "tekken",
}
"""(steps, whether a word that is a token is taken whole without merging) -> llama.cpp's name."""

ALIASES = {
    "llama-bpe": ("llama3", "llama-v3", "falcon3", "falcon-h1", "pixtral", "midm-2.0", "lfm2"),
    "dbrx": ("smaug-bpe", "glm4", "chatglm-bpe"),
    "smollm": ("starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b"),
    "qwen2": ("deepseek-r1-qwen", "megrez", "stablelm2", "hunyuan", "solar-open", "grok-2", "kormo"),
    "gpt-2": ("phi-2", "mpt", "olmo", "jais", "gigachat", "mellum", "trillion", "exaone4"),
    "gpt-4o": ("llama4", "kanana2", "minimax-m2"),
}
"""Other names of the same steps."""


def pre_name(spec: Mapping[str, Any]) -> str:
    """llama.cpp's name for the words that a ``tokenizer.json`` cuts.

    Raises:
        ExportError: it has none that is known to be the same.
    """
    normalizer = spec.get("normalizer")
    steps = tuple(_step(part) for part in _parts(spec.get("pre_tokenizer")))
    name = NAMES.get((steps, bool(spec["model"].get("ignore_merges"))))
    if name is None or normalizer not in (None, {"type": "NFC"}):
        raise ExportError(
            "llama.cpp would tokenize differently: of the pre-tokenizers it has, none is known to do "
            f"{' then '.join(steps) or 'nothing'} after the normalizer {normalizer}"
        )
    return name


def pre_tokenizer(name: str) -> tuple[Any, bool] | None:
    """The pre-tokenizer of the ``tokenizers`` library and ``ignore_merges`` for llama.cpp's name.

    None for a name that the table lacks.
    """
    from tokenizers import Regex, pre_tokenizers

    name = next((known for known, others in ALIASES.items() if name in others), name)
    key = next((key for key, value in NAMES.items() if value == name), None)
    if key is None:
        return None
    made: list[Any] = []
    for step in key[0]:
        if step.startswith("split:"):
            made.append(pre_tokenizers.Split(Regex(step.removeprefix("split:")), behavior="isolated"))
        elif step == "digits":
            made.append(pre_tokenizers.Digits(individual_digits=True))
        else:
            made.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=step == "words"))
    return (made[0] if len(made) == 1 else pre_tokenizers.Sequence(made)), key[1]


def _parts(step: Mapping[str, Any] | None) -> list[Mapping[str, Any]]:
    if step is None:
        return []
    if step["type"] == "Sequence":
        return [one for part in step["pretokenizers"] for one in _parts(part)]
    return [step]


def _step(part: Mapping[str, Any]) -> str:
    """A step in the words of the table; one that has none there comes back as it is."""
    kind = part["type"]
    if kind == "ByteLevel" and not part.get("add_prefix_space"):
        return "words" if part.get("use_regex", True) else "bytes"
    if kind == "Digits" and part.get("individual_digits"):
        return "digits"
    # To remove everything between matches is to isolate the matches, as these expressions match all text.
    cutting = (str(part.get("behavior")).lower(), bool(part.get("invert")))
    if kind == "Split" and "Regex" in part["pattern"] and cutting in (("isolated", False), ("removed", True)):
        return "split:" + str(part["pattern"]["Regex"])
    return str(dict(part))
