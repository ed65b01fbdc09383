"""Hugging Face folders: lazy and exact reading, and everything that may be wrong with one."""

import json
import struct

import pytest
import torch
from safetensors.torch import load_file, save_file

from poise.checkpoints import open_checkpoint
from poise.core.errors import CheckpointError


def shard(folder):
    """Splits model.safetensors in two, with an index."""
    tensors = load_file(folder / "model.safetensors")
    halves = sorted(tensors)[::2], sorted(tensors)[1::2]
    index = {}
    for number, half in enumerate(halves, 1):
        file = f"model-{number:05}-of-00002.safetensors"
        save_file({name: tensors[name] for name in half}, folder / file)
        index.update(dict.fromkeys(half, file))
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    return index


def test_tensors_are_read_exactly(llama):
    checkpoint, expected = open_checkpoint(llama), load_file(llama / "model.safetensors")
    assert set(checkpoint.tensors()) == set(expected)
    assert checkpoint.dtype == torch.bfloat16
    for name, tensor in expected.items():
        assert torch.equal(checkpoint.read(name), tensor)
        assert checkpoint.tensors()[name].nbytes == tensor.numel() * 2


def test_shards_are_one_model(llama, copy_of):
    folder = copy_of(llama)
    shard(folder)
    whole, sharded = open_checkpoint(llama), open_checkpoint(folder)
    assert all(torch.equal(whole.read(name), sharded.read(name)) for name in whole.tensors())


def test_a_tied_head_in_the_file_is_a_copy(model_factory, copy_of):
    folder = copy_of(model_factory("llama-tied"))
    tensors = load_file(folder / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, folder / "model.safetensors")
    assert "lm_head.weight" not in open_checkpoint(folder).tensors()


def test_the_fingerprint_follows_the_contents(llama, copy_of):
    folder = copy_of(llama)
    assert open_checkpoint(folder).fingerprint() == open_checkpoint(llama).fingerprint()
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"][0] += 1
    save_file(tensors, folder / "model.safetensors")
    assert open_checkpoint(folder).fingerprint() != open_checkpoint(llama).fingerprint()


def truncate(path, keep=0.5):
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * keep)])


def lie_about_sizes(path):
    data = path.read_bytes()
    length = struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8 : 8 + length])
    header["model.norm.weight"]["data_offsets"][1] += 4096
    new = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(new)) + new + data[8 + length :])


def claim_a_huge_header(path):
    path.write_bytes(struct.pack("<Q", 1 << 60) + path.read_bytes()[8:])


@pytest.mark.parametrize(
    "damage", [truncate, lie_about_sizes, claim_a_huge_header, lambda p: p.write_bytes(b"")]
)
def test_damaged_files_are_named(llama, copy_of, damage):
    folder = copy_of(llama)
    damage(folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"model\.safetensors: damaged or truncated"):
        open_checkpoint(folder)


def test_a_missing_shard_is_named(llama, copy_of):
    folder = copy_of(llama)
    shard(folder)
    (folder / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"model-00002-of-00002\.safetensors, which is missing"):
        open_checkpoint(folder)


@pytest.mark.parametrize(
    "target", ["../secret.safetensors", "/etc/secret.safetensors", "sub/../../x.safetensors"]
)
def test_an_index_may_not_leave_its_folder(llama, copy_of, target):
    folder = copy_of(llama)
    index = shard(folder)
    index["model.norm.weight"] = target
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    with pytest.raises(CheckpointError, match="outside the folder"):
        open_checkpoint(folder)


def test_an_index_that_names_an_absent_tensor(llama, copy_of):
    folder = copy_of(llama)
    index = shard(folder)
    index["model.extra.weight"] = "model-00001-of-00002.safetensors"
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    with pytest.raises(CheckpointError, match=r"lacks model\.extra\.weight"):
        open_checkpoint(folder)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "weights.pth"])
def test_pickles_are_refused(llama, copy_of, name):
    folder = copy_of(llama)
    (folder / "model.safetensors").rename(folder / name)
    with pytest.raises(CheckpointError, match="Loading a pickle runs code"):
        open_checkpoint(folder)


@pytest.mark.parametrize("text", ["", "{", "[1]", '"x"'])
def test_a_configuration_that_is_no_object(llama, copy_of, text):
    folder = copy_of(llama)
    (folder / "config.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"config\.json"):
        open_checkpoint(folder)


def test_models_of_other_quantizers_are_refused(llama, copy_of):
    from conftest import edit_json

    folder = copy_of(llama)
    edit_json(folder / "config.json", quantization_config={"quant_method": "gptq"})
    with pytest.raises(CheckpointError, match="already quantized with gptq"):
        open_checkpoint(folder)


@pytest.mark.parametrize(
    "source",
    ["nowhere", "./nowhere/model", "/nowhere/at/all", "some-org/no-such-model", "hf://some-org/none@main"],
)
def test_what_is_not_there_is_said(source):
    with pytest.raises(CheckpointError, match="no such folder"):
        open_checkpoint(source)


def test_empty_folder(tmp_path):
    with pytest.raises(CheckpointError, match=r"has no config\.json"):
        open_checkpoint(tmp_path)


def test_a_hub_id_is_found_in_the_cache_when_offline(llama, tmp_path, monkeypatch):
    """The cache layout of huggingface_hub: refs, snapshots, and blobs behind links."""
    import shutil

    root = tmp_path / "models--org--tiny"
    (root / "refs").mkdir(parents=True)
    (root / "refs" / "main").write_text("0" * 40)
    (root / "snapshots").mkdir()
    shutil.copytree(llama, root / "snapshots" / ("0" * 40))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    from poise.checkpoints import _download

    assert (_download("org/tiny", None) / "config.json").exists()
