"""A tokenizer as GGUF metadata.

llama.cpp runs tokenizers with code of its own, of two kinds:

    gpt2     byte-level BPE. Merges come from the file; how text is cut into words before merging is code,
             chosen by a name (``tokenizer.ggml.pre``). The name is found by comparing structures
             (``gguf_pretokenizer``), never by a model's name.
    llama    SentencePiece-like BPE over characters with byte fallback. There are no merges in the file:
             any two neighbours that together are a token may merge, best score first.

A tokenizer that neither reproduces is refused: a model that reads other tokens than it was trained on
answers nonsense without any error.
"""

import json
import re
from collections.abc import Mapping
from typing import Any

from poise.core.errors import ExportError
from poise.layouts.gguf_header import Value, flag, floats, ints, strings, text, u32
from poise.layouts.gguf_pretokenizer import pre_name

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
SPACE = "\u2581"
BYTE_TOKEN = re.compile(r"<0x[0-9A-F]{2}>")
SPECIAL = {
    "bos": "bos_token_id",
    "eos": "eos_token_id",
    "unknown": "unk_token_id",
    "seperator": "sep_token_id",  # llama.cpp spells it so
    "padding": "pad_token_id",
    "mask": "mask_token_id",
}
PHI3_NAMES = ("phi-3", "phi3")
PHI3_TOKENS = ("</s>", "<unk>", "<s>", "<|endoftext|>")

Spec = Mapping[str, Any]


def tokenizer_keys(tokenizer: Any, rows: int, generation: Mapping[str, Any]) -> dict[str, Value]:
    """GGUF keys of a transformers tokenizer.

    Args:
        rows: rows of the embedding; llama.cpp wants exactly that many tokens.
        generation: contents of ``generation_config.json``, {} without.

    Raises:
        ExportError: llama.cpp would tokenize differently.
    """
    spec = _spec(tokenizer)
    tokens, types = _tokens(spec, rows, tokenizer.unk_token_id)
    keys = {"tokens": strings(tokens), "token_type": ints(types)}
    if spec["model"].get("byte_fallback"):
        keys |= {
            "model": text("llama"),
            "pre": text("default"),
            "scores": floats(_scores(spec, tokens, types)),
        }
        keys["add_space_prefix"] = flag(_space_prefix(spec))
    else:
        keys |= {"model": text("gpt2"), "pre": text(pre_name(spec))}
        keys["merges"] = strings([" ".join(pair) for pair in _merges(spec)])
        keys["add_space_prefix"] = flag(False)
    keys |= _special_keys(tokenizer, rows, generation)
    return {f"tokenizer.ggml.{key}": value for key, value in keys.items()} | _templates(tokenizer)


def fits_name(name: str, tokens: list[str]) -> bool:
    """Whether llama.cpp loads a model of this name: names of phi-3 demand four tokens by their text."""
    return not any(part in name.lower() for part in PHI3_NAMES) or set(PHI3_TOKENS) <= set(tokens)


def _spec(tokenizer: Any) -> dict[str, Any]:
    """The tokenizer's ``tokenizer.json``, if it is a BPE that llama.cpp could run."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise ExportError(f"{type(tokenizer).__name__} has no tokenizer.json form; GGUF export needs one")
    spec: dict[str, Any] = json.loads(backend.to_str())
    model = spec["model"]
    if model["type"] != "BPE":
        raise ExportError(f"GGUF export writes BPE tokenizers, this is {model['type']}")
    odd = [key for key in ("dropout", "continuing_subword_prefix", "end_of_word_suffix") if model.get(key)]
    if odd:
        raise ExportError(f"llama.cpp would tokenize differently: it knows no {odd[0]} in BPE")
    return spec


def _merges(spec: Spec) -> list[tuple[str, str]]:
    pairs = (merge.split(" ", 1) if isinstance(merge, str) else merge for merge in spec["model"]["merges"])
    return [(left, right) for left, right in pairs]


def _tokens(spec: Spec, rows: int, unknown: int | None) -> tuple[list[str], list[int]]:
    """Text and type of each token. Ids beyond the embedding cannot be fed to the model and are left out."""
    tokens = [f"[PAD{number}]" for number in range(rows)]
    types = [UNUSED] * rows
    byte_fallback = bool(spec["model"].get("byte_fallback"))
    for content, number in spec["model"]["vocab"].items():
        if number < rows:
            tokens[number] = content
            types[number] = BYTE if byte_fallback and BYTE_TOKEN.fullmatch(content) else NORMAL
    for token in spec["added_tokens"]:
        if token["id"] < rows:
            tokens[token["id"]], types[token["id"]] = _added(token, types[token["id"]])
    if byte_fallback and unknown is not None and unknown < rows:
        types[unknown] = UNKNOWN
    if len(set(tokens)) != rows:
        twice = next(token for token in tokens if tokens.count(token) > 1)
        raise ExportError(f"the vocabulary holds {twice!r} twice, which llama.cpp refuses")
    return tokens, types


def _added(token: Mapping[str, Any], before: int) -> tuple[str, int]:
    """An added token's text and type. llama.cpp looks for it in the text before spaces become ``SPACE``.

    That a token swallows the spaces beside it (``lstrip``, ``rstrip``) has no place in a GGUF file.
    """
    content = token["content"]
    if token["special"]:
        return content, CONTROL
    if SPACE in content and before == NORMAL and not token["normalized"]:
        return content, NORMAL  # a run of spaces, which merges build: only the literal sign would match
    return (content.replace(SPACE, " ") if token["normalized"] else content), USER_DEFINED


def _scores(spec: Spec, tokens: list[str], types: list[int]) -> list[float]:
    """A score for each token such that merging best first follows the order of the merges."""
    if spec["model"].get("ignore_merges"):
        raise ExportError(
            "llama.cpp would tokenize differently: it knows no ignore_merges with byte fallback"
        )
    missing = sum(f"<0x{byte:02X}>" not in spec["model"]["vocab"] for byte in range(256))
    if missing:
        raise ExportError(f"llama.cpp would tokenize differently: {missing} byte tokens of 256 are missing")
    merges = _merges(spec)
    normal = [token for token, kind in zip(tokens, types, strict=True) if kind == NORMAL]
    _refuse_missing_merges(set(merges), normal)
    scores = _class_scores(merges)
    return [scores.get(token, 0.0) for token in tokens]


def _class_scores(merges: list[tuple[str, str]]) -> dict[str, float]:
    """Minus the rank of the first merge that builds a token.

    Tokens whose merges are interleaved share a score, which makes llama.cpp merge the leftmost first. Runs
    of one character are such tokens (spaces in Llama 2), and for them that is what the merges do, too.
    """
    first: dict[str, int] = {}
    last: dict[str, int] = {}
    for rank, (left, right) in enumerate(merges):
        first.setdefault(left + right, rank)
        last[left + right] = rank
    scores: dict[str, float] = {}
    begin, end, opener = 0, -1, ""
    for token, rank in first.items():
        if rank > end:
            begin, end, opener = rank, last[token], token
        elif set(token) != set(opener) or len(set(token)) > 1:
            raise ExportError(
                "llama.cpp would tokenize differently: it has one score a token, but the merges that build "
                f"{opener!r} and {token!r} are interleaved"
            )
        end = max(end, last[token])
        scores[token] = -float(begin)
    return scores


def _refuse_missing_merges(merges: set[tuple[str, str]], normal: list[str]) -> None:
    known = set(normal)
    for token in normal:
        for cut in range(1, len(token)):
            pair = token[:cut], token[cut:]
            if pair not in merges and pair[0] in known and pair[1] in known:
                raise ExportError(
                    f"llama.cpp would tokenize differently: it merges {pair[0]!r} and {pair[1]!r}, because "
                    f"{token!r} is a token; the tokenizer has no such merge"
                )


def _space_prefix(spec: Spec) -> bool:
    """Whether a space is put before the text; all that llama.cpp lets a file say about normalization.

    llama.cpp puts it after every special token as well, and before a text that begins with a space. Of the
    ways that transformers has, ``Prepend`` does the same, and ``Metaspace`` differs in these two places.
    """
    steps = [*_flat(spec.get("normalizer")), *_flat(spec.get("pre_tokenizer"))]
    prefix = False
    for step in steps:
        kind = step["type"]
        if kind == "Prepend" and step["prepend"] == SPACE:
            prefix = True
        elif kind == "Metaspace" and step["replacement"] == SPACE and not step.get("split", True):
            prefix = prefix or step.get("prepend_scheme", "always") != "never"
        elif kind == "Replace" and step["pattern"] == {"String": " "} and step["content"] == SPACE:
            continue
        elif kind == "Split" and step["pattern"] == {"String": " "}:
            continue  # every space has been replaced by then
        else:
            raise ExportError(f"llama.cpp would tokenize differently: it knows no step {step}")
    return prefix


def _flat(step: Mapping[str, Any] | None) -> list[Mapping[str, Any]]:
    """The steps of a normalizer or pre-tokenizer, sequences taken apart."""
    if step is None:
        return []
    inner = step.get("normalizers") or step.get("pretokenizers")
    return [step] if inner is None else [one for part in inner for one in _flat(part)]


def _special_keys(tokenizer: Any, rows: int, generation: Mapping[str, Any]) -> dict[str, Value]:
    keys = {}
    for name, attribute in SPECIAL.items():
        number = getattr(tokenizer, attribute, None)
        if number is not None and number < rows:
            keys[f"{name}_token_id"] = u32(number)
    ends = generation.get("eos_token_id")
    others = [end for end in ends if end != tokenizer.eos_token_id] if isinstance(ends, list) else []
    if len(others) == 1 and others[0] < rows:
        keys["eot_token_id"] = u32(others[0])
    return keys | _frame(tokenizer)


def _frame(tokenizer: Any) -> dict[str, Value]:
    """Whether the tokenizer puts its begin and end tokens around a text, found by trying."""
    bare = tokenizer("a", add_special_tokens=False)["input_ids"]
    framed = tokenizer("a", add_special_tokens=True)["input_ids"]
    begin = framed[:1] == [tokenizer.bos_token_id] and framed[: len(bare)] != bare
    end = framed[-1:] == [tokenizer.eos_token_id] and framed[-len(bare) :] != bare
    expected = [tokenizer.bos_token_id] * begin + bare + [tokenizer.eos_token_id] * end
    if framed != expected:
        raise ExportError(
            f"llama.cpp would tokenize differently: 'a' becomes {framed}, it can only add begin and end"
        )
    return {"add_bos_token": flag(begin), "add_eos_token": flag(end)}


def _templates(tokenizer: Any) -> dict[str, Value]:
    template = getattr(tokenizer, "chat_template", None)
    if isinstance(template, str) and template:
        return {"tokenizer.chat_template": text(template)}
    if not isinstance(template, dict):
        return {}
    named = {name: value for name, value in sorted(template.items()) if name != "default"}
    keys = {f"tokenizer.chat_template.{name}": text(value) for name, value in named.items()}
    if named:
        keys["tokenizer.chat_templates"] = strings(list(named))
    if "default" in template:
        keys["tokenizer.chat_template"] = text(template["default"])
    return keys
