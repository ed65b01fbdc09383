"""Tiny models, tokenizers and exports for the tests of GGUF."""

import json
from pathlib import Path
from unittest.mock import patch

import torch

import conftest
import poise.core.registry as registry
from poise.checkpoints.gguf import GgufCheckpoint
from poise.checkpoints.huggingface import HuggingFaceCheckpoint
from poise.core.plan import Plan, PlanRow
from poise.exporters.gguf import Gguf

TEXT = " ".join(
    [
        Path(__file__).read_text(),
        "Ünïcödé déjà vu Straße ПРИВЕТ Привет мир 你好世界 こんにちは 안녕하세요 مرحبا שלום हिन्दी नमस्ते",
        "1234567 3.14159 I'm sure they'll say you're wrong\n\n\n   x\t\ty spaces    and     more     spaces",
    ]
)
VARIED = [
    "Hello world",
    "runs  of   spaces    inside   ",
    "I'm sure they'll say you'RE wrong, it's 'S",
    "12345678 3.14159 0xFF 1,000,000",
    "tabs\tand\n\nnewlines\r\n\r\n  end\n",
    "def f(x):\n    return x**2  # über",
    "ПРИВЕТ Привет мир ПриветМир HelloWorld camelCase HTMLParser",
    "你好世界，こんにちは。 안녕하세요",
    "مرحبا بالعالم שלום",
    "Ünïcödé naïve Straße ÉCOLE",
    "emoji 😀👍🏽 ½ ² Ⅷ",
    "a/b//c\\d?!...;;((--))",
    "\u00a0nbsp\u3000wide\u200bzero",
]
SPECIAL = ["<unk>", "<s>", "</s>", "<pad>"]


def build(folder: Path, name: str, dtype: str = "float32", **overrides: object) -> HuggingFaceCheckpoint:
    """A random model whose attention is sharp, so that a wrong rotation changes every score."""
    with patch.dict(conftest.ARCHITECTURES, {"qwen2": conftest.BASE}):
        conftest.build_model(folder, name, dtype, **{"initializer_range": 0.2, **overrides})
    return HuggingFaceCheckpoint(folder, str(folder))


def export(checkpoint, folder: Path, formats: dict[str, str] | None = None) -> GgufCheckpoint:
    """Exports with the named tensors quantized by rounding to nearest, and reads the file back."""
    folder.mkdir()
    rows = tuple(
        PlanRow(
            name=linear.name,
            role=linear.role,
            rows=linear.rows,
            columns=linear.columns,
            format=(formats or {}).get(linear.name),
            solver="rtn" if linear.name in (formats or {}) else None,
            activations=None,
            reason="test",
        )
        for linear in checkpoint.linears()
    )
    made = codes(checkpoint, formats or {})
    path = Gguf().export(
        checkpoint, Plan(recipe="test", exporter="gguf", rows=rows), made.__getitem__, folder
    )
    return GgufCheckpoint(path, str(path))


def codes(checkpoint, formats: dict[str, str]):
    """Tensor name -> QTensor."""
    rtn = registry.build("solver", "rtn")
    linears = {linear.name: linear for linear in checkpoint.linears()}
    return {
        name: rtn.solve(
            checkpoint.read_matrix(linears[name]), registry.build("format", spec).resolve("float16")
        )
        for name, spec in formats.items()
    }


def tokens(count: int = 60) -> list[int]:
    return torch.randint(0, 320, (count,), generator=torch.Generator().manual_seed(1)).tolist()


def byte_level(pre_tokenizer, ignore_merges: bool = False, normalizer=None, begin: bool = False):
    """A byte-level BPE tokenizer of at most 1000 tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    made = Tokenizer(models.BPE(ignore_merges=ignore_merges))
    made.pre_tokenizer, made.decoder = pre_tokenizer, decoders.ByteLevel()
    if normalizer is not None:
        made.normalizer = normalizer
    trainer = trainers.BpeTrainer(
        vocab_size=1000,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    made.train_from_iterator([TEXT], trainer)
    if begin:
        made.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    made.add_tokens(["<tool>"])
    return PreTrainedTokenizerFast(
        tokenizer_object=made,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        chat_template="{{ messages[0]['content'] }}",
    )


def cut(*steps):
    """A pre-tokenizer of one or more steps, by their names in ``gguf_pretokenizer``."""
    from tokenizers import Regex, pre_tokenizers

    made = {
        "bytes": lambda: pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        "words": lambda: pre_tokenizers.ByteLevel(add_prefix_space=False),
        "digits": lambda: pre_tokenizers.Digits(individual_digits=True),
    }
    parts = [made[s]() if s in made else pre_tokenizers.Split(Regex(s), behavior="isolated") for s in steps]
    return parts[0] if len(parts) == 1 else pre_tokenizers.Sequence(parts)


def sentence_piece(style: str, complete: bool = True):
    """A BPE with byte fallback, as transformers converts SentencePiece models: all merges there can be."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    vocabulary, ranks = _pieces()
    merges = [
        (token[:cut], token[cut:])
        for token in sorted(ranks, key=ranks.__getitem__)
        for cut in range(1, len(token))
        if token[:cut] in vocabulary and token[cut:] in vocabulary
    ]
    merges = merges if complete else merges[::2]
    made = Tokenizer(
        models.BPE(vocab=vocabulary, merges=merges, byte_fallback=True, unk_token="<unk>", fuse_unk=True)
    )
    made.add_special_tokens(SPECIAL[:3])
    spaces = normalizers.Replace(" ", "▁")
    if style == "prepend":
        made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), spaces])
    elif style == "metaspace":
        made.pre_tokenizer = pre_tokenizers.Metaspace("▁", prepend_scheme="first", split=False)
    else:
        made.normalizer = spaces
        made.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    strip = [decoders.Strip(" ", 1, 0)] if style != "gemma" else []
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    made.decoder = decoders.Sequence(steps)
    made.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=made, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


def _pieces() -> tuple[dict[str, int], dict[str, int]]:
    """A vocabulary of characters, bytes and learned pieces, and the rank of each learned piece."""
    from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers

    learner = Tokenizer(models.BPE())
    learner.normalizer = normalizers.Replace(" ", "▁")
    learner.pre_tokenizer = pre_tokenizers.Split(Regex("▁?[^▁]+|▁+"), "isolated")
    special = SPECIAL[:3] + [f"<0x{byte:02X}>" for byte in range(256)]
    trainer = trainers.BpeTrainer(vocab_size=1000, special_tokens=special, show_progress=False)
    learner.train_from_iterator([TEXT], trainer)
    model = json.loads(learner.to_str())["model"]
    ranks: dict[str, int] = {}
    for rank, merge in enumerate(model["merges"]):
        ranks.setdefault("".join(merge), rank)
    return model["vocab"], ranks
