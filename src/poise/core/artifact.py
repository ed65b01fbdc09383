"""An exported folder and its manifest: what is in it, and how it came to be."""

import hashlib
import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path

from poise.core.errors import CheckpointError
from poise.core.plan import Plan

SCHEMA_VERSION = 1
MANIFEST = "manifest.json"
CARD = "README.md"
SHINGLES = "calibration.shingles"
"""Hashes of what the model read, 64-bit little-endian, so that no text that it knows can judge it."""


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """Everything here follows from the inputs: two equal runs write the same bytes.

    Attributes:
        model: file or folder inside the artifact that an engine is pointed at, ``.`` for the folder.
        bits_per_weight: of the whole model, from bytes on disk.
        linear_bits_per_weight: of the quantized linears alone (no embedding, no floats), from bytes on disk.
        calibration: sha256 of the text whose statistics the codes follow, None if they follow none.
        gates: acceptance ranges of the recipe, added to the default ones.
        weights: number of weights of the model; ``linear_weights`` of them are in quantized linears.
        files: sha256 and size of every file but the manifest itself.
    """

    source: str
    source_fingerprint: str
    source_bytes: int
    recipe: str
    exporter: str
    model: str
    plan_hash: str
    calibration: str | None
    gates: dict[str, float]
    weights: int
    weight_bytes: int
    bits_per_weight: float
    linear_weights: int
    linear_bits_per_weight: float
    command: str
    versions: dict[str, str]
    commit: str | None
    dirty: bool
    files: dict[str, dict[str, str | int]]
    schema_version: int = SCHEMA_VERSION


@dataclass(frozen=True, kw_only=True)
class Artifact:
    """A folder written by an exporter."""

    path: Path
    manifest: Manifest
    plan: Plan

    @property
    def model(self) -> Path:
        """What an engine is pointed at."""
        return self.path / self.manifest.model

    @classmethod
    def open(cls, path: Path) -> "Artifact":
        """Raises ``CheckpointError`` when the folder has no manifest or plan of a known version."""
        try:
            data = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
            if data["schema_version"] != SCHEMA_VERSION:
                raise ValueError(f"schema_version {data['schema_version']} is not {SCHEMA_VERSION}")
            plan = Plan.from_json((path / "plan.json").read_text(encoding="utf-8"))
            return cls(path=path, manifest=Manifest(**data), plan=plan)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise CheckpointError(f"{path}: not an artifact of Poise ({error})") from error

    def damaged(self) -> list[str]:
        """Files that are missing or differ from the manifest."""
        return [
            name
            for name, entry in self.manifest.files.items()
            if not (self.path / name).is_file() or sha256(self.path / name) != entry["sha256"]
        ]

    def replace_card(self, text: str) -> "Artifact":
        """Writes the model card and its new hash; each file changes in one step."""
        write_atomically(self.path / CARD, text)
        manifest = Manifest(**{**asdict(self.manifest), "files": list_files(self.path)})
        write_manifest(self.path, manifest)
        return Artifact(path=self.path, manifest=manifest, plan=self.plan)


def sha256(path: Path) -> str:
    """Hash of a file, read in pieces."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def list_files(folder: Path) -> dict[str, dict[str, str | int]]:
    """Hash and size of every file of a folder but the manifest."""
    names = sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())
    return {
        name: {"sha256": sha256(folder / name), "bytes": (folder / name).stat().st_size}
        for name in names
        if name != MANIFEST
    }


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Puts the manifest into its folder, in one step."""
    write_atomically(folder / MANIFEST, json.dumps(asdict(manifest), indent=1) + "\n")


def write_atomically(path: Path, text: str) -> None:
    """The file is either the old one or the whole new one, also after a crash."""
    beside = path.with_name(path.name + ".new")
    beside.write_text(text, encoding="utf-8")
    os.replace(beside, path)


def find_artifact(source: str | Path) -> Artifact | None:
    """The artifact at a folder, or None for any other kind of model."""
    return Artifact.open(Path(source)) if (Path(source) / MANIFEST).is_file() else None
