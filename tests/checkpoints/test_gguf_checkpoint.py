"""GGUF files as sources: any block type, hostile headers, and nothing lost on the way through."""

import struct
import time

import gguf
import numpy as np
import pytest
import torch

from gguf_tools import build, export
from poise.checkpoints import open_checkpoint
from poise.checkpoints.gguf import GgufCheckpoint
from poise.core.errors import CheckpointError
from poise.layouts.gguf_blocks import unpack
from poise.layouts.gguf_header import read_header

MATRIX = "model.layers.0.self_attn.v_proj.weight"


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    folder = tmp_path_factory.mktemp("llama")
    return export(build(folder / "model", "llama"), folder / "out")


@pytest.fixture(scope="module")
def wide(tmp_path_factory):
    """Rows of 256, which super-blocks need."""
    folder = tmp_path_factory.mktemp("wide")
    source = build(folder / "model", "llama", hidden_size=256, num_hidden_layers=1, head_dim=16)
    return export(source, folder / "out")


def rewrite(checkpoint, path, metadata=(), tensors=(), drop=()):
    """A copy with other keys {key: (value, type)} and other tensors {name: (bytes, type)}."""
    header = read_header(checkpoint.path)
    writer = gguf.GGUFWriter(path, header.get("general.architecture"))
    changed = dict(metadata)
    for key, (kind, items, value) in header.metadata.items():
        if key not in changed and key != "general.architecture" and key not in drop:
            items = None if items is None else gguf.GGUFValueType(items)
            writer.add_key_value(key, value, gguf.GGUFValueType(kind), items)
    for key, (value, kind) in changed.items():
        writer.add_key_value(key, value, kind)
    content = checkpoint.path.read_bytes()
    for name, entry in header.tensors.items():
        raw = np.frombuffer(content[entry.start : entry.start + entry.nbytes], dtype=np.uint8)
        data, kind = dict(tensors).get(name, (raw.reshape(*entry.shape[:-1], -1), entry.type))
        if name not in drop:
            writer.add_tensor(name, data, raw_dtype=gguf.GGMLQuantizationType[kind])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


QUANTIZED = sorted(
    kind.name
    for kind, (block, _) in gguf.GGML_QUANT_SIZES.items()
    if block > 1 and 256 % block == 0 and kind.name not in ("Q8_1", "Q8_K")  # these hold activations
)


@pytest.mark.parametrize("kind", QUANTIZED)
def test_every_block_type_decodes_as_the_gguf_package_does(wide, tmp_path, kind):
    block, nbytes = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]]
    raw = np.random.default_rng(0).integers(0, 256, (32, 256 // block * nbytes), dtype=np.uint8)
    path = rewrite(wide, tmp_path / "x.gguf", tensors={"blk.0.attn_v.weight": (raw, kind)})
    checkpoint = GgufCheckpoint(path, "x")
    assert checkpoint.tensors()[MATRIX].stored == kind
    with np.errstate(all="ignore"):
        try:
            expected = gguf.dequantize(raw, gguf.GGMLQuantizationType[kind])
        except NotImplementedError:  # newer than the package's decoders: by the format of that name
            expected = unpack(torch.from_numpy(raw), kind, 256).numpy()
        assert np.array_equal(checkpoint.read(MATRIX).numpy(), expected, equal_nan=True)


def test_a_tensor_owns_its_memory(llama):
    first, second = llama.read(MATRIX), llama.read(MATRIX)
    first.zero_()
    assert float(second.abs().max()) > 0


@pytest.mark.parametrize(
    ("format", "dtype"),
    [
        ("float(dtype='float16')", torch.float16),
        ("float(dtype='bfloat16')", torch.bfloat16),
        ("float(dtype='float32')", torch.float32),
        ("int(bits=4, group=32)", torch.bfloat16),
    ],
)
def test_dtype_is_what_kept_matrices_are_written_in(llama, tmp_path, format, dtype):
    formats = {linear.name: format for linear in llama.linears()}
    written = export(llama, tmp_path / "out", formats)
    assert written.dtype == dtype
    assert written.config["dtype"] == str(dtype).removeprefix("torch.")
    again = export(written, tmp_path / "again")
    assert {info.stored for info in again.tensors().values()} == {
        "F32",
        {"float16": "F16", "bfloat16": "BF16", "float32": "F32"}[again.config["dtype"]],
    }


def test_linears_and_bytes(llama):
    roles = [linear.role for linear in llama.linears()]
    assert roles[:4] == ["embedding", "attention.q", "attention.k", "attention.v"]
    assert roles[-1] == "head"
    assert 0 < llama.path.stat().st_size - llama.total_bytes < 40_000
    assert isinstance(open_checkpoint(llama.path), GgufCheckpoint)


def test_the_fingerprint_follows_the_file(llama, tmp_path):
    copy = tmp_path / "copy.gguf"
    copy.write_bytes(llama.path.read_bytes())
    prints = {GgufCheckpoint(copy, "x").fingerprint()}
    assert prints == {GgufCheckpoint(copy, "x").fingerprint()}
    for position in (1000, copy.stat().st_size // 2, copy.stat().st_size - 9):
        content = bytearray(copy.read_bytes())
        content[position] ^= 1
        copy.write_bytes(content)
        try:
            prints.add(GgufCheckpoint(copy, "x").fingerprint())
        except CheckpointError:
            prints.add(f"damaged at {position}")
    assert len(prints) == 4


def test_metadata_goes_through_unchanged(llama, tmp_path):
    extra = {
        "general.author": (b"\xff\xfe", gguf.GGUFValueType.STRING),
        "x.float64": (0.1, gguf.GGUFValueType.FLOAT64),
        "x.int8": (-3, gguf.GGUFValueType.INT8),
        "x.flags": ([True, False], gguf.GGUFValueType.ARRAY),
    }
    source = GgufCheckpoint(rewrite(llama, tmp_path / "x.gguf", extra), "x")
    written = export(source, tmp_path / "out")
    keys = {key: value for key, value in source.gguf_metadata.items() if key != "general.file_type"}
    assert {key: value for key, value in written.gguf_metadata.items() if key in keys} == keys
    assert written.gguf_metadata["x.float64"].value == 0.1


@pytest.mark.parametrize("size", [0, 3, 4, 23, 24, 60, 300, 5000, -1])
def test_a_truncated_file_is_refused(llama, tmp_path, size):
    path = tmp_path / "short.gguf"
    path.write_bytes(llama.path.read_bytes()[:size])
    with pytest.raises(CheckpointError, match=r"short\.gguf: not a usable GGUF file"):
        GgufCheckpoint(path, "x")


def header(tensors=0, keys=0, body=b"", magic=b"GGUF", version=3):
    return magic + struct.pack("<IQQ", version, tensors, keys) + body


def text(value):
    return struct.pack("<Q", len(value)) + value


def key(name, kind, body):
    return text(name) + struct.pack("<I", kind) + body


def tensor(name=b"t", shape=(32,), kind=0, offset=0, dimensions=None):
    sizes = struct.pack(f"<{len(shape)}Q", *shape)
    count = len(shape) if dimensions is None else dimensions
    return text(name) + struct.pack("<I", count) + sizes + struct.pack("<IQ", kind, offset)


HUGE = 1 << 60
HOSTILE = {
    "other magic": (header(magic=b"PK\3\4"), "magic"),
    "version": (header(version=1), "version 1"),
    "big-endian": (header(version=3 << 24), "big-endian"),
    "tensors": (header(tensors=HUGE), "claims 1152921504606846976 tensors"),
    "keys": (header(keys=HUGE), "claims 1152921504606846976 metadata keys"),
    "key name": (header(keys=1, body=struct.pack("<Q", HUGE) + bytes(99)), "takes 1152921504606846976 bytes"),
    "string": (header(keys=1, body=key(b"k", 8, struct.pack("<Q", HUGE)) + bytes(99)), "k takes"),
    "strings": (header(keys=1, body=key(b"k", 9, struct.pack("<IQ", 8, HUGE)) + bytes(99)), "strings in k"),
    "numbers": (header(keys=1, body=key(b"k", 9, struct.pack("<IQ", 0, HUGE)) + bytes(99)), "numbers in k"),
    "nested": (
        header(keys=1, body=key(b"k", 9, struct.pack("<IQ", 9, 1)) + bytes(99)),
        "unknown value type 9",
    ),
    "value type": (header(keys=1, body=key(b"k", 77, bytes(99))), "unknown value type 77"),
    "twice": (header(keys=2, body=2 * key(b"k", 7, b"\1") + bytes(99)), "the metadata key 'k' twice"),
    "alignment": (
        header(keys=1, body=key(b"general.alignment", 4, struct.pack("<I", 33)) + bytes(99)),
        "not a power of two",
    ),
    "dimensions": (header(tensors=1, body=tensor(dimensions=1 << 31) + bytes(999)), "2147483648 dimensions"),
    "overflow": (header(tensors=1, body=tensor(shape=(1 << 62, 1 << 62)) + bytes(999)), "the file has"),
    "empty shape": (header(tensors=1, body=tensor(shape=(32, 0)) + bytes(999)), "cannot hold"),
    "rows": (
        header(tensors=1, body=tensor(shape=(33,), kind=2) + bytes(999)),
        "Q4_0 blocks of 32 cannot hold",
    ),
    "type": (header(tensors=1, body=tensor(kind=4242) + bytes(999)), "unknown type 4242"),
    "offset": (header(tensors=1, body=tensor(offset=1 << 63) + bytes(999)), "truncated or damaged"),
    "unaligned": (header(tensors=1, body=tensor(offset=7) + bytes(999)), "not a multiple of 32"),
    "overlap": (header(tensors=2, body=tensor() + tensor(b"u") + bytes(999)), "overlap"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_header_is_refused_at_once(tmp_path, name):
    content, message = HOSTILE[name]
    path = tmp_path / "evil.gguf"
    path.write_bytes(content)
    begin = time.perf_counter()
    with pytest.raises(CheckpointError, match=r"evil\.gguf") as caught:
        GgufCheckpoint(path, "x")
    assert message in str(caught.value)
    assert time.perf_counter() - begin < 1


def test_flipped_bits_in_the_header_raise_nothing_else(llama, tmp_path):
    content, length = llama.path.read_bytes(), read_header(llama.path).length
    random = np.random.default_rng(0)
    refused = 0
    for _ in range(150):
        damaged = bytearray(content)
        for position in random.integers(0, length, random.integers(1, 5)):
            damaged[position] = random.choice([0, 255, damaged[position] ^ 1 << random.integers(8)])
        (tmp_path / "x.gguf").write_bytes(damaged)
        try:
            checkpoint = GgufCheckpoint(tmp_path / "x.gguf", "x")
            checkpoint.tensors()
            checkpoint.tokenizer()
        except CheckpointError:
            refused += 1
    assert 50 < refused < 150


U32 = gguf.GGUFValueType.UINT32


@pytest.mark.parametrize(
    ("metadata", "drop", "message"),
    [
        ({"llama.block_count": (4_000_000_000, U32)}, (), "expected a number below"),
        ({"llama.block_count": (1_000_000, U32)}, (), "fewer tensors than blocks"),
        ({"llama.block_count": ("two", gguf.GGUFValueType.STRING)}, (), "llama.block_count is two"),
        ({"llama.expert_count": (1 << 20, U32)}, (), "llama.expert_count is 1048576"),
        ({"llama.attention.key_length": (1 << 20, U32)}, (), "llama.attention.key_length is 1048576"),
        ({"llama.rope.scaling.type": ("su", gguf.GGUFValueType.STRING)}, (), "rope scaling 'su'"),
        ({"split.count": (2, gguf.GGUFValueType.UINT16)}, (), "one part of a split model"),
        ({}, ("llama.context_length",), "lacks llama.context_length"),
        ({}, ("token_embd.weight",), "no token_embd.weight"),
    ],
)
def test_metadata_that_makes_no_model_is_refused(llama, tmp_path, metadata, drop, message):
    path = rewrite(llama, tmp_path / "x.gguf", metadata, drop=drop)
    with pytest.raises(CheckpointError, match=message):
        GgufCheckpoint(path, "x")


@pytest.mark.parametrize(
    ("metadata", "drop", "message"),
    [
        ({}, ("blk.1.ffn_up.weight",), r"missing \['blk.1.ffn_up.weight'\]"),
        ({"llama.block_count": (1, U32)}, (), r"unknown \['blk.1.attn_k.weight'"),
        ({"llama.embedding_length": (128, U32)}, (), "the metadata asks for"),
        (
            {"llama.expert_count": (4, U32), "llama.expert_used_count": (2, U32)},
            (),
            "not the tensors of mixtral",
        ),
    ],
)
def test_tensors_that_contradict_the_metadata_are_refused(llama, tmp_path, metadata, drop, message):
    checkpoint = GgufCheckpoint(rewrite(llama, tmp_path / "x.gguf", metadata, drop=drop), "x")
    with pytest.raises(CheckpointError, match=message):
        checkpoint.tensors()


def test_another_architecture_is_refused_by_name(llama, tmp_path):
    content = llama.path.read_bytes().replace(text(b"llama"), text(b"mamba"), 1)
    (tmp_path / "x.gguf").write_bytes(content)
    with pytest.raises(
        CheckpointError, match="architecture 'mamba' are not supported: there is gemma3, gpt2"
    ):
        GgufCheckpoint(tmp_path / "x.gguf", "x")


@pytest.mark.parametrize(
    ("metadata", "drop", "message"),
    [
        ({}, ("tokenizer.ggml.tokens",), "no tokenizer of the kinds"),
        ({"tokenizer.ggml.model": ("rwkv", gguf.GGUFValueType.STRING)}, (), "but 'rwkv'"),
        ({"tokenizer.ggml.pre": ("theirs", gguf.GGUFValueType.STRING)}, (), "its pre-tokenizer 'theirs'"),
    ],
)
def test_a_tokenizer_that_poise_has_no_equal_of_is_refused(llama, tmp_path, metadata, drop, message):
    checkpoint = GgufCheckpoint(rewrite(llama, tmp_path / "x.gguf", metadata, drop=drop), "x")
    with pytest.raises(CheckpointError, match=message):
        checkpoint.tokenizer()
