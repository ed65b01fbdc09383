"""Tiny random models of many architectures, built once a session; the command line in this process."""

import json
import os
import signal
import sys
from pathlib import Path

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # workers of one machine would wait for each other's threads
os.environ.pop("COLUMNS", None)  # tables are as wide as they are for any program that reads them

BASE = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 320,
    "max_position_embeddings": 128,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
GPT2 = {
    "n_embd": 64,
    "n_layer": 2,
    "n_head": 4,
    "vocab_size": 320,
    "n_positions": 128,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
OPT = {
    "hidden_size": 64,
    "ffn_dim": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 320,
    "max_position_embeddings": 128,
    "word_embed_proj_dim": 64,
}
MOE = {"norm_topk_prob": True, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
ARCHITECTURES = {
    "llama": BASE,
    "llama-tied": {**BASE, "tie_word_embeddings": True},
    "mistral": BASE,
    "qwen2": BASE,
    "qwen3": {**BASE, "head_dim": 16},
    "gemma3_text": {**BASE, "head_dim": 16, "query_pre_attn_scalar": 16},
    "phi3": BASE,
    "gpt2": GPT2,
    "opt": OPT,
    "mixtral": {**BASE, "num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen3_moe": {**BASE, **MOE, "head_dim": 16},
}
"""name -> configuration; what follows a dash is a variant."""


def build_model(folder: Path, name: str, dtype: str = "float32", **overrides: object) -> Path:
    """A random model with a byte-level tokenizer, saved as a Hugging Face folder."""
    import torch
    import transformers
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    config = CONFIG_MAPPING[name.partition("-")[0]](**{**ARCHITECTURES[name], **overrides})
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).to(getattr(torch, dtype))
    with torch.no_grad():
        for parameter in model.parameters():  # norms of 1 and zero biases would hide mistakes
            if parameter.dim() == 1:
                parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    build_tokenizer().save_pretrained(folder)
    return folder


def build_tokenizer():
    """A byte-level BPE tokenizer of 320 tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<pad>", "<s>", "</s>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=320, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(
        ["the cat sat on the mat and then the other cat sat there too"] * 20, trainer
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    )


@pytest.fixture(scope="session")
def model_factory(tmp_path_factory):
    """name -> folder of a tiny model; each is built once and must not be changed."""
    built: dict[tuple[str, str], Path] = {}

    def make(name: str, dtype: str = "float32") -> Path:
        key = (name, dtype)
        if key not in built:
            built[key] = build_model(tmp_path_factory.mktemp(name), name, dtype)
        return built[key]

    return make


@pytest.fixture
def llama(model_factory):
    return model_factory("llama", "bfloat16")


@pytest.fixture
def copy_of(tmp_path):
    """A copy of a model that a test may damage."""
    import shutil

    def copy(folder: Path) -> Path:
        return Path(shutil.copytree(folder, tmp_path / f"copy-of-{folder.name}"))

    return copy


def edit_json(path: Path, **changes: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.fixture
def run(monkeypatch, capsys):
    """Runs the command line in this process: (exit code, stdout, stderr)."""
    from poise.cli import main

    before = signal.getsignal(signal.SIGINT)

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["poise", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            main()
        out, err = capsys.readouterr()
        return ended.value.code or 0, out, err

    yield call
    signal.signal(signal.SIGINT, before)
