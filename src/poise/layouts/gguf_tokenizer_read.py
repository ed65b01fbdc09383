"""The tokenizer in a GGUF file as a transformers tokenizer that gives the tokens llama.cpp gives.

transformers has a reader of its own, which guesses normalizer and pre-tokenizer from the architecture's
name. Here they follow from the file: ``tokenizer.ggml.pre`` and ``tokenizer.ggml.add_space_prefix``.
"""

from collections.abc import Callable
from typing import Any

from poise.core.errors import CheckpointError
from poise.layouts.gguf_pretokenizer import pre_tokenizer
from poise.layouts.gguf_tokenizer import BYTE, CONTROL, NORMAL, SPACE, SPECIAL, UNKNOWN, USER_DEFINED

Get = Callable[[str], Any]
"""Value of a ``tokenizer.`` key, given without that prefix; None when the file lacks it."""


def read_tokenizer(get: Get) -> Any:
    """A transformers tokenizer.

    Raises:
        CheckpointError: there is none, or llama.cpp runs it with code that Poise has no equal of.
    """
    from tokenizers import AddedToken
    from transformers import PreTrainedTokenizerFast

    tokens, types = get("ggml.tokens"), get("ggml.token_type")
    kind = get("ggml.model")
    if not tokens or kind not in ("gpt2", "llama"):
        raise CheckpointError(
            f"it has no tokenizer of the kinds that Poise reads (gpt2, llama), but {kind!r}"
        )
    types = types or [NORMAL] * len(tokens)
    if len(types) != len(tokens) or len(set(tokens)) != len(tokens):
        raise CheckpointError("its vocabulary has tokens that occur twice or have no type")
    backend = _byte_level(tokens, get) if kind == "gpt2" else _sentence_piece(tokens, types, get)
    for special, wanted in ((True, (CONTROL, UNKNOWN)), (False, (USER_DEFINED,))):
        added = [token for token, type in zip(tokens, types, strict=True) if type in wanted]
        made = [AddedToken(token, normalized=False, special=special) for token in added]
        backend.add_special_tokens(made) if special else backend.add_tokens(made)
    names = _special(tokens, get)
    backend.post_processor = _frame(tokens, names, get, kind)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        chat_template=_template(get),
        clean_up_tokenization_spaces=False,
        **names,
    )


def _byte_level(tokens: list[str], get: Get) -> Any:
    from tokenizers import Tokenizer, decoders, models

    found = pre_tokenizer(get("ggml.pre") or "default")
    if found is None:
        raise CheckpointError(f"its pre-tokenizer {get('ggml.pre')!r} is not among those that Poise knows")
    vocabulary = {token: number for number, token in enumerate(tokens)}
    pairs = [tuple(merge.split(" ", 1)) for merge in get("ggml.merges") or []]
    # llama.cpp passes over merges that lead nowhere; the tokenizers library refuses them.
    merges = [pair for pair in pairs if len(pair) == 2 and {*pair, "".join(pair)} <= vocabulary.keys()]
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, ignore_merges=found[1]))
    backend.pre_tokenizer = found[0]
    backend.decoder = decoders.ByteLevel()
    return backend


def _sentence_piece(tokens: list[str], types: list[int], get: Get) -> Any:
    from tokenizers import Tokenizer, decoders, models, normalizers

    unknown = next((token for token, type in zip(tokens, types, strict=True) if type == UNKNOWN), None)
    backend = Tokenizer(
        models.BPE(
            vocab={token: number for number, token in enumerate(tokens)},
            merges=_merges(tokens, types, get("ggml.scores") or [0.0] * len(tokens)),
            unk_token=unknown,
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    prefix = get("ggml.add_space_prefix") is not False
    before = [normalizers.Prepend(SPACE)] if prefix else []
    backend.normalizer = normalizers.Sequence([*before, normalizers.Replace(" ", SPACE)])
    after = [decoders.Strip(" ", 1, 0)] if prefix else []
    steps = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), *after]
    backend.decoder = decoders.Sequence(steps)
    return backend


def _merges(tokens: list[str], types: list[int], scores: list[float]) -> list[tuple[str, str]]:
    """Every pair of pieces whose joint text is a token, best score first."""
    mergeable = {
        token: -score
        for token, type, score in zip(tokens, types, scores, strict=True)
        if type not in (CONTROL, BYTE)
    }
    found = [
        (rank, token, cut)
        for token, rank in mergeable.items()
        for cut in range(1, len(token))
        if token[:cut] in mergeable and token[cut:] in mergeable
    ]
    found.sort(key=lambda item: item[0])
    return [(token[:cut], token[cut:]) for _, token, cut in found]


def _special(tokens: list[str], get: Get) -> dict[str, str]:
    """transformers' names of special tokens -> their text."""
    numbers = {attribute: get(f"ggml.{name}_token_id") for name, attribute in SPECIAL.items()}
    return {
        attribute.removesuffix("_id"): tokens[number]
        for attribute, number in numbers.items()
        if number is not None and number < len(tokens)
    }


def _frame(tokens: list[str], names: dict[str, str], get: Get, kind: str) -> Any:
    """Puts the begin and end tokens around a text, as far as llama.cpp does."""
    from tokenizers import processors

    pre = pre_tokenizer(get("ggml.pre") or "default")
    default = kind == "llama" or bool(pre and pre[1])
    wanted = get("ggml.add_bos_token")
    begin = names.get("bos_token") if (default if wanted is None else wanted) else None
    end = names.get("eos_token") if get("ggml.add_eos_token") else None
    if begin is None and end is None:
        return processors.ByteLevel(trim_offsets=False)
    single = [part for part in (begin, "$A", end) if part]
    pair = [part for part in (begin, "$A", end, begin and f"{begin}:1", "$B:1", end and f"{end}:1") if part]
    ids = [(token, tokens.index(token)) for token in dict.fromkeys((begin, end)) if token]
    return processors.TemplateProcessing(single=single, pair=pair, special_tokens=ids)


def _template(get: Get) -> str | dict[str, str] | None:
    named = {name: get(f"chat_template.{name}") for name in get("chat_templates") or []}
    default = get("chat_template")
    if not named:
        return str(default) if default else None
    return {name: value for name, value in {**named, "default": default}.items() if value}
