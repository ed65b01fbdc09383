"""Reading source models: Hugging Face folders, hub ids and GGUF files."""

import os
import re
from pathlib import Path

from poise.core.checkpoint import Checkpoint
from poise.core.errors import CheckpointError

HUB_ID = re.compile(r"(?:hf://)?(?P<repo>[\w.-]+/[\w.-]+)(?:@(?P<revision>[\w./-]+))?")
WEIGHTS = ("*.safetensors", "*.json", "*.jinja", "tokenizer.model", "vocab.txt", "merges.txt")


def open_checkpoint(source: str | Path) -> Checkpoint:
    """The model at a folder, a ``.gguf`` file, or a hub id ``org/name[@revision]`` (also ``hf://``).

    Hub ids go through the hub's cache; with ``HF_HUB_OFFLINE`` only what is cached is used.

    Raises:
        CheckpointError: nothing is there, or it is not a model that Poise reads.
    """
    text = os.fspath(source)
    path = Path(text).expanduser()
    if path.is_file() and path.suffix == ".gguf":
        return _open_gguf(path, text)
    if path.is_file():
        raise CheckpointError(f"{path}: not a model Poise reads; give a folder, a .gguf file or a hub id")
    if path.is_dir() and not (path / "config.json").exists() and len(files := list(path.glob("*.gguf"))) == 1:
        return _open_gguf(files[0], text)
    if path.is_dir():
        return _open_folder(path, text)
    match = HUB_ID.fullmatch(text)
    if match is None or path.is_absolute() or text.startswith("."):
        raise CheckpointError(f"{text}: no such folder or file")
    return _open_folder(_download(match["repo"], match["revision"]), text)


def _open_gguf(path: Path, source: str) -> Checkpoint:
    from poise.checkpoints.gguf import GgufCheckpoint

    return GgufCheckpoint(path, source)


def _open_folder(path: Path, source: str) -> Checkpoint:
    from poise.checkpoints.huggingface import HuggingFaceCheckpoint

    return HuggingFaceCheckpoint(path, source)


def _download(repo: str, revision: str | None) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(repo, revision=revision, allow_patterns=list(WEIGHTS)))
    except LocalEntryNotFoundError as error:
        raise CheckpointError(
            f"{repo}: no such folder, not in the local hub cache, and the hub cannot be reached "
            "(is HF_HUB_OFFLINE set?)"
        ) from error
    except (HfHubHTTPError, OSError, ValueError) as error:
        raise CheckpointError(f"{repo}: not on the hub ({str(error).splitlines()[0]})") from error
