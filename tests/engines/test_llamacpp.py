"""llama.cpp against transformers on the same random weights."""

import ctypes
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from poise.core.errors import EngineError, MissingExtra, UsageError
from poise.core.registry import build, spec_of
from poise.engines import llamacpp
from poise.engines.llamacpp import BATCH, LlamaCpp

pytest.importorskip("xllamacpp")
gguf = pytest.importorskip("gguf")

HEADS, KV_HEADS, LAYERS, HIDDEN, FFN = 4, 2, 2, 64, 128
MERGES = ["t h", "th e", "Ġ c", "a t", "Ġc at"]


def vocabulary():
    """The 256 bytes as GPT-2 writes them, merges, and two control tokens."""
    from tokenizers.pre_tokenizers import ByteLevel

    return [*sorted(ByteLevel.alphabet()), *(merge.replace(" ", "") for merge in MERGES), "<s>", "</s>"]


VOCABULARY = 256 + len(MERGES) + 2


def reference_model():
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=HIDDEN,
        intermediate_size=FFN,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        vocab_size=VOCABULARY,
        max_position_embeddings=4096,
        initializer_range=0.2,
        attn_implementation="eager",
    )
    model = LlamaForCausalLM(config).float().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def rotate_neighbours(weight, heads):
    """Rows of q or k as llama.cpp wants them: it rotates 2i and 2i+1 of a head, transformers i and i+d/2."""
    rows, columns = weight.shape
    return weight.view(heads, 2, rows // heads // 2, columns).transpose(1, 2).reshape(rows, columns)


def write_gguf(path, model, **changes):
    """Writes the model; ``changes`` replace metadata, with dots written as two underscores."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(4096)
    writer.add_embedding_length(HIDDEN)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(FFN)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_layer_norm_rms_eps(model.config.rms_norm_eps)
    writer.add_rope_dimension_count(HIDDEN // HEADS)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(VOCABULARY)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(vocabulary())
    writer.add_token_types([gguf.TokenType.NORMAL] * (VOCABULARY - 2) + [gguf.TokenType.CONTROL] * 2)
    writer.add_token_merges(MERGES)
    writer.add_bos_token_id(VOCABULARY - 2)
    writer.add_eos_token_id(VOCABULARY - 1)
    for key, value in changes.items():
        entry = writer.kv_data[0][key.replace("__", ".")]
        entry.value = value
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, LAYERS)
    for name, weight in model.state_dict().items():
        if "q_proj" in name or "k_proj" in name:
            weight = rotate_neighbours(weight, HEADS if "q_proj" in name else KV_HEADS)
        stem, _, ending = name.rpartition(".")
        writer.add_tensor(f"{names.get_name(stem)}.{ending}", weight.contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def checkpoint(path):
    return SimpleNamespace(path=path)


def some_tokens(n, seed=1):
    return torch.randint(VOCABULARY, (n,), generator=torch.Generator().manual_seed(seed)).tolist()


@pytest.fixture(scope="module")
def model():
    return reference_model()


@pytest.fixture(scope="module")
def file(model, tmp_path_factory):
    return write_gguf(tmp_path_factory.mktemp("gguf") / "tiny.gguf", model)


@pytest.fixture
def engine(file):
    with LlamaCpp(threads=1, context=BATCH) as engine:
        engine.load(checkpoint(file))
        yield engine


@pytest.fixture
def float32_attention(monkeypatch):
    """Contexts with float32 keys and values and no flash attention, so that only the weights matter.

    The engine does not do this: the fields move from release to release.
    """
    lib = llamacpp._library()

    def flash_keys_values(params):
        return [ctypes.c_int32.from_buffer(params, offset) for offset in (52, 104, 108)]

    if [field.value for field in flash_keys_values(lib.llama_context_default_params())] != [-1, 1, 1]:
        pytest.skip("this xllamacpp has these fields elsewhere")

    def init(model, params, real=lib.llama_init_from_model):
        for field in flash_keys_values(params):
            field.value = 0
        return real(model, params)

    monkeypatch.setattr(lib, "llama_init_from_model", init)


@torch.no_grad()
def expected(model, tokens):
    return model(torch.tensor([tokens])).logits[0]


def test_several_texts_at_once_go_on_as_each_alone(engine):
    """Prompts longer than one pass, and as many at once as the benchmark takes; the engine reads on as before afterwards."""
    prompts = [some_tokens(BATCH + 30, seed) for seed in range(16)]
    alone = [engine.generate(tokens, 5).tokens for tokens in prompts]
    assert engine.generate_many(prompts, 5) == alone
    assert len({tuple(tokens) for tokens in alone}) > 4
    assert engine.generate(prompts[3], 5).tokens == alone[3]


def test_float32_weights_give_the_scores_of_transformers(float32_attention, model, engine):
    tokens = some_tokens(BATCH + 100)
    scores = engine.logits(tokens)
    assert scores.dtype == torch.float32
    assert scores.shape == (len(tokens), VOCABULARY)
    torch.testing.assert_close(scores, expected(model, tokens), rtol=0, atol=2e-4)  # scores spread by 1.7


def test_keys_and_values_in_float16_cost_little(model, engine):
    tokens = some_tokens(BATCH + 100)
    ours, theirs = engine.logits(tokens).log_softmax(-1), expected(model, tokens).log_softmax(-1)
    assert (ours.exp() - theirs.exp()).abs().max() < 3e-3
    assert (theirs.exp() * (theirs - ours)).sum(-1).mean() < 1e-5


def test_a_batch_boundary_never_shows(float32_attention, engine, monkeypatch):
    tokens = some_tokens(BATCH + 1)
    whole = engine.logits(tokens)
    torch.testing.assert_close(engine.logits(tokens[:-1]), whole[:-1], rtol=0, atol=1e-4)
    monkeypatch.setattr(llamacpp, "BATCH", 33)  # smaller passes than the context was made for
    torch.testing.assert_close(engine.logits(tokens), whole, rtol=0, atol=1e-4)


def test_scores_do_not_depend_on_earlier_calls(engine, file):
    tokens = some_tokens(50)
    first = engine.logits(tokens)
    engine.logits(some_tokens(200, seed=2))
    engine.generate(some_tokens(20, seed=3), 5)
    kept = first.clone()
    assert torch.equal(engine.logits(tokens), kept)
    assert torch.equal(first, kept), "logits must be a copy of the library's buffer"
    with LlamaCpp(threads=1, context=1000) as other:
        other.load(checkpoint(file))
        assert torch.equal(other.logits(tokens), kept)


def test_the_context_grows(engine, model):
    tokens = some_tokens(3 * BATCH + 5)
    before = engine.logits(tokens[:10])
    assert engine.logits(tokens).shape == (len(tokens), VOCABULARY)
    assert len(engine.generate(tokens, BATCH).tokens) == BATCH
    assert torch.equal(engine.logits(tokens[:10]), before)


@pytest.mark.parametrize("length", [1, 20, BATCH, BATCH + 7])
def test_generation_is_the_chain_of_best_tokens(float32_attention, engine, length):
    prompt = some_tokens(length)
    made = engine.generate(prompt, 6)
    text = prompt + made.tokens
    assert engine.logits(text)[length - 1 : -1].argmax(-1).tolist() == made.tokens
    assert made.seconds == sorted(made.seconds)
    assert len(made.seconds) == 6
    assert made.seconds[0] > 0


def test_nothing_to_read_or_to_make(engine):
    assert engine.logits([]).shape == (0, VOCABULARY)
    assert engine.generate([1, 2], 0).tokens == []
    with pytest.raises(EngineError, match="the prompt is empty"):
        engine.generate([], 3)


@pytest.mark.parametrize("token", [-1, VOCABULARY, 2**32])
def test_tokens_outside_the_vocabulary_are_refused(engine, token):
    with pytest.raises(EngineError, match=f"vocabulary of {VOCABULARY}"):
        engine.logits([1, token])
    assert engine.logits([1, 2]).isfinite().all()


def test_the_tokenizer_is_that_of_the_file(engine):
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    merges = [tuple(merge.split()) for merge in MERGES]
    theirs = Tokenizer(models.BPE({word: i for i, word in enumerate(vocabulary())}, merges))
    theirs.pre_tokenizer, theirs.decoder = (
        pre_tokenizers.ByteLevel(add_prefix_space=False),
        decoders.ByteLevel(),
    )
    for text in ("", "the cat", " the  cat's 12 hats!\n", "naïve 🐈"):
        assert engine.tokenize(text) == theirs.encode(text).ids
    assert engine.tokenize("<s>", special=True) == [VOCABULARY - 2]
    assert len(engine.tokenize("<s>")) == 3


@pytest.mark.parametrize("fraction", [0.0, 0.001, 0.3, 0.99])
def test_a_truncated_file_is_refused(file, tmp_path, fraction):
    data = file.read_bytes()
    short = tmp_path / "short.gguf"
    short.write_bytes(data[: int(fraction * len(data))])
    with pytest.raises(EngineError, match=r"short\.gguf: llama\.cpp cannot run it: \w+"):
        LlamaCpp(threads=1).load(checkpoint(short))


def test_a_damaged_header_is_refused(file, tmp_path):
    data = bytearray(file.read_bytes())
    data[8:16] = (2**40).to_bytes(8, "little")  # the number of tensors
    damaged = tmp_path / "damaged.gguf"
    damaged.write_bytes(data)
    with pytest.raises(EngineError, match="damaged"):
        LlamaCpp(threads=1).load(checkpoint(damaged))


@pytest.mark.parametrize(
    "change",
    [{"llama__block_count": 0}, {"llama__attention__layer_norm_rms_epsilon": float("nan")}],
    ids=["while loading", "while computing"],
)
def test_a_failed_assertion_of_llamacpp_leaves_the_process_alive(model, engine, tmp_path, change):
    hostile = write_gguf(tmp_path / "hostile.gguf", model, **change)
    with LlamaCpp(threads=2) as refused:
        with pytest.raises(EngineError, match=r"\.cpp:\d+: "):
            refused.load(checkpoint(hostile))
        with pytest.raises(EngineError, match="call load first"):
            refused.logits([1])
    assert engine.logits([1, 2]).isfinite().all()


def test_a_process_that_survived_still_ends(model, tmp_path):
    hostile = write_gguf(tmp_path / "hostile.gguf", model, llama__block_count=0)
    code = (
        "import sys; from types import SimpleNamespace as N; from poise.engines.llamacpp import LlamaCpp\n"
        "try: LlamaCpp().load(N(path=sys.argv[1]))\n"
        "except Exception as error: print(type(error).__name__)"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    done = subprocess.run(
        [sys.executable, "-c", code, hostile], capture_output=True, text=True, timeout=120, env=environment
    )
    assert (done.returncode, done.stdout.split()) == (0, ["EngineError"]), done.stderr


def test_other_files_are_refused_with_the_way_out(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"")
    for path in (tmp_path, tmp_path / "model.safetensors", tmp_path / "absent.gguf"):
        with pytest.raises(EngineError, match="export the model to gguf first"):
            LlamaCpp().load(checkpoint(path))


def test_a_closed_engine_refuses_and_loads_again(file):
    engine = LlamaCpp(threads=1, context=64)
    engine.close()
    engine.load(checkpoint(file))
    engine.load(checkpoint(file))
    engine.close()
    engine.close()
    for use in (lambda: engine.logits([1]), lambda: engine.generate([1], 1), lambda: engine.tokenize("a")):
        with pytest.raises(EngineError, match="call load first"):
            use()
    engine.load(checkpoint(file))
    assert engine.logits([1]).shape == (1, VOCABULARY)
    engine.close()


@pytest.fixture
def unguarded():
    """The library is looked at anew, before and after."""
    llamacpp._library.cache_clear()
    yield
    llamacpp._library.cache_clear()


def test_without_the_wheel_the_extra_is_named(unguarded, monkeypatch, file):
    monkeypatch.setitem(sys.modules, "xllamacpp", None)
    with pytest.raises(MissingExtra, match=r"poise\[llamacpp\]"):
        LlamaCpp().load(checkpoint(file))


@pytest.mark.parametrize("function", list(llamacpp.DEFAULTS))
def test_a_release_that_moves_fields_is_refused(unguarded, monkeypatch, function, file):
    field = list(llamacpp.DEFAULTS[function])[-1]
    monkeypatch.setitem(llamacpp.DEFAULTS[function], field, 7)
    with pytest.raises(EngineError, match=f"{field}.*pip install 'xllamacpp=="):
        LlamaCpp().load(checkpoint(file))


def test_a_context_of_another_size_than_asked_for_is_refused(engine, monkeypatch):
    monkeypatch.setattr(llamacpp._library(), "llama_n_ubatch", lambda runner: 512)
    with pytest.raises(EngineError, match="lays out its structs otherwise"):
        engine.logits(some_tokens(BATCH + 1))


def test_a_release_without_a_function_is_refused(unguarded, monkeypatch, file):
    monkeypatch.setattr(llamacpp, "SIGNATURES", (("llama_of_another_day", None, []),))
    with pytest.raises(EngineError, match="llama_of_another_day"):
        LlamaCpp().load(checkpoint(file))


def test_the_spec_carries_its_arguments():
    assert spec_of(build("engine", "llamacpp(threads=2)")) == "llamacpp(threads=2)"
    for arguments in ("threads=-1", "context=0"):
        with pytest.raises(UsageError, match="at least"):
            build("engine", f"llamacpp({arguments})")


def test_as_many_threads_as_cores_by_default(file):
    with LlamaCpp(context=64) as engine:
        engine.load(checkpoint(file))
        assert engine._lib.llama_n_threads(engine._runner) == llamacpp._cores() >= 1
