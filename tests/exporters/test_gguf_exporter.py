"""llama.cpp must compute what transformers computes, and read the tokens transformers reads."""

import json

import pytest
import torch

from conftest import edit_json
from gguf_tools import VARIED, build, byte_level, codes, cut, export, sentence_piece, tokens
from poise.checkpoints.gguf import GgufCheckpoint
from poise.checkpoints.huggingface import HuggingFaceCheckpoint
from poise.core.errors import ExportError
from poise.core.linear import Linear
from poise.core.plan import Plan, PlanRow
from poise.core.registry import build as build_spec
from poise.exporters.gguf import Gguf
from poise.layouts import gguf as layout
from poise.layouts import gguf_pretokenizer as pre
from poise.layouts.gguf_metadata import complete

YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32, "rope_theta": 10000.0}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
    "rope_theta": 10000.0,
}
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0 + 0.125 * i for i in range(8)],
    "long_factor": [2.0 + 0.25 * i for i in range(8)],
    "original_max_position_embeddings": 256,
}
GEMMA = {"query_pre_attn_scalar": 16}
GEMMA_ROPE = {
    "full_attention": {"rope_type": "linear", "factor": 2.0, "rope_theta": 50000.0},
    "sliding_attention": {"rope_type": "default", "rope_theta": 500.0},
}
DEFAULT_500 = {"rope_type": "default", "rope_theta": 500.0}
LINEAR = {"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0}
PARTIAL = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}
MODELS = {
    "llama": ("llama", {}),
    "llama-tied": ("llama-tied", {}),
    "llama-theta": ("llama", {"rope_parameters": DEFAULT_500}),
    "llama-wide-heads": ("llama", {"head_dim": 32}),
    "llama-biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama-llama3-rope": ("llama", {"rope_parameters": LLAMA3}),
    "llama-linear-rope": ("llama", {"rope_parameters": LINEAR}),
    "llama-yarn": ("llama", {"rope_parameters": YARN}),
    "mistral": ("mistral", {"sliding_window": None}),
    "mixtral": ("mixtral", {}),
    "qwen2": ("qwen2", {}),
    "qwen2-linear-rope": ("qwen2", {"rope_parameters": LINEAR}),
    "qwen2-yarn": ("qwen2", {"rope_parameters": YARN}),
    "qwen3": ("qwen3", {}),
    "qwen3-yarn": ("qwen3", {"rope_parameters": YARN}),
    "qwen3-tied": ("qwen3", {"tie_word_embeddings": True}),
    "qwen3-linear-rope": ("qwen3", {"rope_parameters": LINEAR}),
    "qwen3moe": ("qwen3_moe", {"norm_topk_prob": True}),
    "qwen3moe-linear-rope": ("qwen3_moe", {"norm_topk_prob": True, "rope_parameters": LINEAR}),
    "qwen3moe-yarn": ("qwen3_moe", {"norm_topk_prob": True, "rope_parameters": YARN}),
    "gemma3": ("gemma3_text", GEMMA),
    "gemma3-window": (
        "gemma3_text",
        {**GEMMA, "num_hidden_layers": 7, "sliding_window": 8, "rope_parameters": GEMMA_ROPE},
    ),
    "gemma3-softcap": ("gemma3_text", {**GEMMA, "final_logit_softcapping": 0.5}),
    "phi3": ("phi3", {}),
    "phi3-partial": ("phi3", {"rope_parameters": PARTIAL}),
    "phi3-longrope": (
        "phi3",
        {
            "max_position_embeddings": 1024,
            "original_max_position_embeddings": 256,
            "rope_parameters": LONGROPE,
        },
    ),
    "gpt2": ("gpt2", {}),
    "gpt2-inner": ("gpt2", {"n_inner": 96}),
}
NOT_IN_FILE = {
    *("architectures", "initializer_range", "pretraining_tp", "pad_token_id", "n_inner", "head_dim"),
    *("original_max_position_embeddings", "rope_parameters"),
}
"""Settings that a GGUF file has no key for, or that are spelled out where they were left to a default."""


def run_llama_cpp(checkpoint, ids):
    from poise.engines.llamacpp import LlamaCpp

    with LlamaCpp(context=256) as engine:
        engine.load(checkpoint)
        return engine.logits(ids)


def run_transformers(checkpoint, ids):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(
        checkpoint.path, dtype=torch.float32, attn_implementation="eager"
    )
    with torch.no_grad():
        return model.eval()(torch.tensor([ids])).logits[0]


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """name -> (source, exported file), every matrix kept in float32; each is made once."""
    made = {}

    def make(name):
        if name not in made:
            folder = tmp_path_factory.mktemp(name)
            kind, overrides = MODELS[name]
            source = build(folder / "model", kind, **overrides)
            made[name] = source, export(source, folder / "out")
        return made[name]

    return make


@pytest.mark.parametrize("name", MODELS)
def test_llama_cpp_computes_what_transformers_computes(exported, name):
    """Up to llama.cpp's float16 keys and values; a wrong name, order or setting is off by more."""
    source, written = exported(name)
    expected, found = (run(c, tokens()) for run, c in ((run_transformers, source), (run_llama_cpp, written)))
    assert float((expected - found).abs().max()) < 0.01 * float(expected.abs().max())


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        ("llama", {"heads": 0}),
        ("gemma3", {"shift": 0.0}),
        ("qwen3moe", {"sources": "reversed"}),
    ],
)
def test_the_comparison_sees_a_tensor_that_is_not_rearranged(exported, tmp_path, monkeypatch, name, damage):
    source, _ = exported(name)
    slots = layout.slots(complete(source.config), {k: v.shape for k, v in source.tensors().items()})
    for slot in slots:
        for field, value in damage.items():
            if getattr(slot, field):
                object.__setattr__(slot, field, slot.sources[::-1] if value == "reversed" else value)
    monkeypatch.setattr("poise.exporters.gguf.slots", lambda *_: slots)
    difference = run_transformers(source, tokens()) - run_llama_cpp(
        export(source, tmp_path / "out"), tokens()
    )
    assert float(difference.abs().max()) > 1


@pytest.mark.parametrize("name", MODELS)
def test_reading_back_gives_every_tensor_bit_for_bit(exported, name):
    source, written = exported(name)
    assert written.tensors().keys() == source.tensors().keys()
    for tensor, info in source.tensors().items():
        expected = source.read(tensor)
        if name.startswith("gemma3") and tensor.endswith("norm.weight"):
            expected = (expected + 1) - 1  # what the file's weight + 1 leaves
        assert written.tensors()[tensor].shape == info.shape
        assert torch.equal(written.read(tensor), expected), tensor


@pytest.mark.parametrize("name", [name for name in MODELS if name != "mistral"])
def test_reading_back_gives_the_configuration(exported, name):
    source, written = (complete(checkpoint.config) for checkpoint in exported(name))
    assert written["model_type"] == source["model_type"]
    assert {k: v for k, v in written.items() if k not in NOT_IN_FILE} == {
        k: v for k, v in source.items() if k not in NOT_IN_FILE
    }
    if "rope_parameters" in source and "longrope" not in name:
        assert written["rope_parameters"] == source["rope_parameters"]


@pytest.mark.parametrize("name", ["llama", "llama-llama3-rope", "mixtral", "gemma3", "gpt2"])
def test_the_same_input_gives_the_same_bytes(exported, tmp_path, name):
    source, written = exported(name)
    again = export(source, tmp_path / "again")
    through_gguf = export(written, tmp_path / "through")
    assert again.path.read_bytes() == written.path.read_bytes() == through_gguf.path.read_bytes()


BLOCKS = {
    "Q4_0": "int(bits=4, group=32)",
    "Q5_0": "int(bits=5, group=32)",
    "Q8_0": "int(bits=8, group=32)",
    "Q4_1": "int(bits=4, group=32, symmetric=False, zero='minimum')",
    "Q5_1": "int(bits=5, group=32, symmetric=False, zero='minimum')",
    "F16": "float(dtype='float16')",
    "BF16": "float(dtype='bfloat16')",
}


@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("name", ["llama", "mixtral", "gpt2", "phi3"])
def test_quantized_weights_come_back_as_they_were_decoded(exported, tmp_path, name, block):
    """Rows of q and k, transposed weights and stacks of experts included."""
    source, _ = exported(name)
    linears = {linear.name: linear for linear in source.linears() if linear.role != "router"}
    formats = dict.fromkeys(linears, BLOCKS[block])
    written = export(source, tmp_path / "out", formats)
    for tensor, qtensor in codes(source, formats).items():
        assert written.tensors()[tensor].stored == block
        assert torch.equal(written.read_matrix(linears[tensor]).float(), qtensor.decode()), tensor


@pytest.mark.parametrize("block", [block for block in BLOCKS if block.startswith("Q")])
def test_llama_cpp_decodes_the_blocks_as_poise_does(exported, tmp_path, block):
    """Against the same decoded weights in float32; llama.cpp rounds activations to 8 bits on top."""
    source, _ = exported("llama")
    formats = {linear.name: BLOCKS[block] for linear in source.linears()}
    written = export(source, tmp_path / "out", formats)
    plain = export(written, tmp_path / "plain", dict.fromkeys(formats, "float(dtype='float32')"))
    expected, found = run_llama_cpp(plain, tokens()), run_llama_cpp(written, tokens())
    assert float((expected - found).norm() / expected.norm()) < 0.1


def test_kept_tensors_have_the_type_of_the_checkpoint_and_small_ones_float32(tmp_path):
    source = build(tmp_path / "model", "mixtral", "bfloat16")
    written = export(source, tmp_path / "out")
    stored = {name: info.stored for name, info in written.tensors().items()}
    assert written.dtype == torch.bfloat16
    assert stored["model.layers.0.self_attn.q_proj.weight"] == "BF16"
    assert stored["model.layers.0.block_sparse_moe.gate.weight"] == "F32"
    assert stored["model.norm.weight"] == "F32"
    for tensor in source.tensors():
        assert torch.equal(written.read(tensor).float(), source.read(tensor).float())


@pytest.mark.parametrize("block", BLOCKS)
def test_the_file_type_names_the_block_of_most_weights(exported, tmp_path, block):
    numbers = {"F16": 1, "Q4_0": 2, "Q4_1": 3, "Q8_0": 7, "Q5_0": 8, "Q5_1": 9, "BF16": 32}
    source, _ = exported("llama")
    written = export(source, tmp_path / "out", {linear.name: BLOCKS[block] for linear in source.linears()})
    assert written.gguf_metadata["general.file_type"].value == numbers[block]
    assert ("general.quantization_version" in written.gguf_metadata) == block.startswith("Q")


def linear(columns=128, role="ffn.up"):
    return Linear(name="x", rows=64, columns=columns, role=role, block=0, input_group="x")


@pytest.mark.parametrize(
    ("spec", "matrix", "activations", "reason"),
    [
        ("int(bits=4, group=32)", linear(), None, None),
        ("float(dtype='float32')", linear(role="router"), None, None),
        ("int(bits=4, group=64)", linear(), None, "llama.cpp has no block for int(bits=4, group=64)"),
        ("int(bits=3, group=32)", linear(), None, "llama.cpp has no block for int(bits=3, group=32)"),
        (
            "int(bits=4, group=32, scale='float32')",
            linear(),
            None,
            "llama.cpp has no block for int(bits=4, group=32, scale='float32')",
        ),
        (
            "int(bits=4, group=32, symmetric=False)",
            linear(),
            None,
            "llama.cpp has no block for int(bits=4, group=32, symmetric=False)",
        ),
        ("int(bits=4, group=32)", linear(100), None, "rows of 100 are not a multiple of the block of 32"),
        ("int(bits=8, group=32)", linear(), 8, "llama.cpp rounds activations itself"),
        ("int(bits=8, group=32)", linear(role="router"), None, "llama.cpp keeps routers in float32"),
    ],
)
def test_what_it_accepts_and_why_not(spec, matrix, activations, reason):
    assert Gguf().accepts(matrix, build_spec("format", spec), activations) == reason


def test_experts_of_a_stack_share_a_format(exported, tmp_path):
    source, _ = exported("mixtral")
    one = "model.layers.1.block_sparse_moe.experts.2.w1.weight"
    with pytest.raises(
        ExportError, match=r"blk.1.ffn_gate_exps.weight.*kept for .*experts.0.w1.*Q?int.*2.w1"
    ):
        export(source, tmp_path / "out", {one: "int(bits=4, group=32)"})


def test_codes_that_contradict_the_plan_are_refused(exported, tmp_path):
    source, _ = exported("llama")
    name = "model.layers.0.mlp.up_proj.weight"
    row = PlanRow(
        name=name,
        role="ffn.up",
        rows=128,
        columns=64,
        format="int(bits=4, group=32)",
        solver="rtn",
        activations=None,
        reason="test",
    )
    plan = Plan(recipe="test", exporter="gguf", rows=(row,))
    wrong = codes(source, {name: "int(bits=8, group=32)"})
    with pytest.raises(ExportError, match=r"promises Q4_0 \[128, 64\], the codes are int\(bits=8"):
        Gguf().export(source, plan, wrong.__getitem__, tmp_path)


@pytest.mark.parametrize(
    ("kind", "changes", "message"),
    [
        ("opt", {}, "supports gemma3_text, gpt2, llama, mistral, mixtral, phi3, qwen2, qwen3, qwen3_moe"),
        ("llama", {"hidden_act": "gelu"}, "with the activation silu, the model has gelu"),
        (
            "llama",
            {"rope_parameters": {**LINEAR, "rope_type": "dynamic"}},
            "no rope scaling 'dynamic' for llama",
        ),
        ("llama", {"rope_parameters": PARTIAL}, "rotates whole heads"),
        ("llama", {"rope_parameters": {**YARN, "beta_fast": 16}}, "runs yarn with beta_fast = 32"),
        ("llama", {"rope_parameters": {**YARN, "attention_factor": 1.0}}, "runs yarn with attention_factor"),
        ("qwen3", {"rope_parameters": LLAMA3}, "no rope scaling 'llama3' for qwen3"),
        ("qwen3", {"attention_bias": True}, "with attention_bias = False"),
        ("qwen3_moe", {"norm_topk_prob": False}, "with norm_topk_prob = True"),
        ("gemma3_text", {"query_pre_attn_scalar": 256}, r"by 1/sqrt\(16\), the model by 1/sqrt\(256\)"),
        ("gemma3_text", {**GEMMA, "layer_types": ["full_attention"] * 2}, "every 6th layer"),
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "with scale_attn_by_inverse_layer_idx = False"),
    ],
)
def test_what_llama_cpp_would_compute_differently_is_refused(model_factory, copy_of, kind, changes, message):
    folder = copy_of(model_factory(kind))
    edit_json(folder / "config.json", **changes)
    with pytest.raises(ExportError, match=message):
        Gguf().check(HuggingFaceCheckpoint(folder, str(folder)))


@pytest.mark.parametrize(("kind", "arch"), [("mistral", "llama"), ("phi3", "phi3")])
def test_context_ends_with_the_window_where_llama_cpp_has_none(tmp_path, kind, arch):
    written = export(build(tmp_path / "model", kind, sliding_window=64), tmp_path / "out")
    assert written.gguf_metadata[f"{arch}.context_length"].value == 64
    assert kind != "phi3" or written.config["sliding_window"] == 64


def test_a_value_that_float16_cannot_hold_is_refused(tmp_path):
    source = build(tmp_path / "model", "llama", "float16")
    spiked = type(
        "Spiked",
        (HuggingFaceCheckpoint,),
        {"read": lambda s, n: HuggingFaceCheckpoint.read(s, n).float() * 1e9},
    )
    with pytest.raises(ExportError, match="more than F16 can"):
        export(spiked(source.path, "x"), tmp_path / "out")


TOKENIZERS = {
    "gpt-2": lambda: byte_level(cut("words")),
    "smollm": lambda: byte_level(cut("digits", "words")),
    "llama-bpe": lambda: byte_level(cut(pre.LLAMA3, "bytes"), ignore_merges=True, begin=True),
    "dbrx": lambda: byte_level(cut(pre.LLAMA3, "bytes")),
    "qwen2": lambda: byte_level(cut(pre.QWEN2, "bytes")),
    "qwen35": lambda: byte_level(cut(pre.QWEN35, "bytes")),
    "gpt-4o": lambda: byte_level(cut(pre.GPT4O, "bytes")),
    "tekken": lambda: byte_level(cut(pre.TEKKEN, "bytes"), ignore_merges=True, begin=True),
    "prepend": lambda: sentence_piece("prepend"),
    "metaspace": lambda: sentence_piece("metaspace"),
    "gemma": lambda: sentence_piece("gemma"),
}


def with_tokenizer(model_factory, copy_of, tokenizer):
    folder = copy_of(model_factory("llama"))
    rows = len(tokenizer) + 7
    source = HuggingFaceCheckpoint(folder, str(folder))
    from safetensors.torch import save_file

    wide = {"model.embed_tokens.weight", "lm_head.weight"}
    tensors = {
        name: torch.zeros(rows, 64) if name in wide else source.read(name) for name in source.tensors()
    }
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    edit_json(folder / "config.json", vocab_size=rows)
    tokenizer.save_pretrained(folder)
    return HuggingFaceCheckpoint(folder, str(folder))


@pytest.mark.parametrize("name", TOKENIZERS)
def test_llama_cpp_reads_the_tokens_that_transformers_reads(model_factory, copy_of, tmp_path, name):
    from transformers import AutoTokenizer

    from poise.engines.llamacpp import LlamaCpp

    source = with_tokenizer(model_factory, copy_of, TOKENIZERS[name]())
    written = export(source, tmp_path / "out")
    (tmp_path / "side").mkdir()
    for file, content in written.sidecars().items():
        (tmp_path / "side" / file).write_bytes(content)
    readers = [source.tokenizer(), written.tokenizer(), AutoTokenizer.from_pretrained(tmp_path / "side")]
    with LlamaCpp() as engine:
        engine.load(written)
        for text in [*VARIED, "", "x<tool>y</s>"]:
            if name in ("prepend", "metaspace", "gemma") and "<" in text:
                continue  # after special tokens the ways to prefix a space differ
            expected = engine.tokenize(text, special=True)
            for reader in readers:
                assert reader(text, add_special_tokens=False)["input_ids"] == expected, text
                assert reader.decode(expected) == readers[0].decode(expected)
    framed = readers[0]("a")["input_ids"]
    assert all(reader("a")["input_ids"] == framed for reader in readers)
    assert written.gguf_metadata["tokenizer.ggml.add_bos_token"].value == (framed[0] == 1)


def test_tokens_are_padded_to_the_rows_of_the_embedding(model_factory, copy_of, tmp_path):
    source = with_tokenizer(model_factory, copy_of, byte_level(cut("words")))
    written = export(source, tmp_path / "out")
    names = written.gguf_metadata["tokenizer.ggml.tokens"].value
    assert len(names) == source.config["vocab_size"]
    assert names[-7:] == [f"[PAD{number}]" for number in range(len(names) - 7, len(names))]
    assert set(written.gguf_metadata["tokenizer.ggml.token_type"].value[-7:]) == {5}
    assert written.gguf_metadata["tokenizer.chat_template"].value == "{{ messages[0]['content'] }}"
    assert run_llama_cpp(written, [1, 2]).shape == (2, len(names))


def unigram():
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    made = Tokenizer(models.Unigram([("<unk>", 0.0), ("a", -1.0)], unk_id=0))
    return PreTrainedTokenizerFast(tokenizer_object=made, unk_token="<unk>")


def framed_oddly():
    from tokenizers import processors

    made = byte_level(cut("words"))
    made.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<pad> $A", special_tokens=[("<pad>", 3)]
    )
    return made


@pytest.mark.parametrize(
    ("tokenizer", "message"),
    [
        (
            lambda: byte_level(cut(r"\w+|\W", "bytes")),
            r"would tokenize differently.*split:\\w\+\|\\W then bytes",
        ),
        (lambda: byte_level(cut("words"), ignore_merges=True), "would tokenize differently"),
        (lambda: byte_level(cut(pre.QWEN2, "words")), "would tokenize differently"),
        (lambda: sentence_piece("gemma", complete=False), "the tokenizer has no such merge"),
        (unigram, "writes BPE tokenizers, this is Unigram"),
        (framed_oddly, "it can only add begin and end"),
    ],
)
def test_a_tokenizer_that_llama_cpp_would_run_differently_is_refused(
    model_factory, copy_of, tokenizer, message
):
    source = with_tokenizer(model_factory, copy_of, tokenizer())
    with pytest.raises(ExportError, match=message):
        Gguf().check(source)


def test_a_second_end_token_is_the_end_of_a_turn(model_factory, copy_of, tmp_path):
    folder = copy_of(model_factory("llama"))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 5]}))
    written = export(HuggingFaceCheckpoint(folder, str(folder)), tmp_path / "out")
    assert written.gguf_metadata["tokenizer.ggml.eot_token_id"].value == 5
    assert json.loads(written.sidecars()["generation_config.json"])["eos_token_id"] == [2, 5]


def test_a_name_that_llama_cpp_would_choke_on_is_left_out(model_factory, tmp_path):
    """Names with phi-3 make it look for tokens that this vocabulary lacks."""
    folder = model_factory("phi3")
    for name, kept in (("org/Phi-3-tiny", False), ("org/tiny@main", True)):
        written = export(HuggingFaceCheckpoint(folder, name), tmp_path / name.replace("/", "-"))
        assert ("general.name" in written.gguf_metadata) == kept
        assert run_llama_cpp(GgufCheckpoint(written.path, "x"), [1]).shape == (1, 320)
