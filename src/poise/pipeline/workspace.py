"""Where a run keeps what is not finished, beside its output.

``out.partial/`` holds one file of codes for every quantized matrix, written under another name and renamed
when whole, so that a run that was killed at any point continues from the last finished matrix. The
artifact is assembled in it too, and becomes ``out`` by one rename when it has been read back.
"""

import errno
import hashlib
import json
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from poise.core.errors import PoiseError, UsageError
from poise.core.format import QTensor
from poise.core.plan import PlanRow
from poise.core.registry import build

TUNED = "tuned"
"""Name of what was tuned beside matrices."""


class Workspace:
    """The unfinished state of one output folder.

    Args:
        out: the folder that the run will make.
        key: what determines the result; a run can only be resumed with the same.

    Raises:
        UsageError: ``out`` exists and ``force`` is not given, or there is an unfinished run and neither
            ``resume`` nor ``force`` says what to do with it.
    """

    def __init__(self, out: Path, key: dict[str, str], *, resume: bool = False, force: bool = False) -> None:
        self.out = out
        self.path = out.with_name(out.name + ".partial")
        if out.exists() and not force:
            raise UsageError(f"{out} exists; choose another folder, or --force to replace it")
        if self.path.exists() and not resume and not force:
            raise UsageError(
                f"{self.path} holds an unfinished run: --resume continues it, --force starts again"
            )
        if self.path.exists() and resume:
            self._check_key(key)
        elif self.path.exists():
            shutil.rmtree(self.path)
        self.codes_folder.mkdir(parents=True, exist_ok=True)
        (self.path / "key.json").write_text(json.dumps(key, indent=1))

    @property
    def codes_folder(self) -> Path:
        return self.path / "codes"

    def _check_key(self, key: dict[str, str]) -> None:
        try:
            before = json.loads((self.path / "key.json").read_text())
        except (OSError, ValueError):
            return  # killed before the first matrix: there is nothing to mix up
        changed = sorted(name for name in {*before, *key} if before.get(name) != key.get(name))
        if changed:
            raise UsageError(
                f"{self.path} is of another run ({', '.join(changed)} changed): --force starts again"
            )

    def has(self, row: PlanRow) -> bool:
        return self._file(row).exists()

    def store(self, row: PlanRow, weight: QTensor) -> None:
        """Keeps a quantized matrix; the file is whole or absent."""
        _store(weight, self._file(row))

    def load(self, row: PlanRow) -> QTensor:
        """A matrix as it was solved, or as it was tuned if tuning is finished."""
        tuned = self._file(row).with_suffix(".tuned")
        file = tuned if (self.path / f"{TUNED}.safetensors").exists() and tuned.exists() else self._file(row)
        return QTensor.unpack(load_file(file), build("format", str(row.format)), row.columns)

    def store_tuned(self, row: PlanRow, weight: QTensor) -> None:
        """Keeps a tuned matrix, which counts once ``finish_tuned`` was called."""
        _store(weight, self._file(row).with_suffix(".tuned"))

    def finish_tuned(self, tensors: dict[str, Tensor]) -> None:
        """Keeps the tensors that were tuned beside the matrices, and makes all of it count."""
        self.store_tensors(TUNED, tensors)

    def load_tuned(self) -> dict[str, Tensor] | None:
        """What ``finish_tuned`` kept, or None."""
        return self.load_tensors(TUNED)

    def store_tensors(self, name: str, values: dict[str, Tensor]) -> None:
        """Keeps tensors that the run needs again when it is resumed."""
        unfinished = self.path / f"{name}.new"
        save_file({key: value.contiguous() for key, value in values.items()}, unfinished)
        os.replace(unfinished, self.path / f"{name}.safetensors")

    def load_tensors(self, name: str) -> dict[str, Tensor] | None:
        """What ``store_tensors`` kept, or None."""
        file = self.path / f"{name}.safetensors"
        return load_file(file) if file.exists() else None

    def note(self, outcome: dict[str, Any]) -> None:
        """Keeps what solving a matrix came to."""
        with open(self.path / "outcomes.jsonl", "a", encoding="utf-8") as file:
            file.write("\n" + json.dumps(outcome))  # after what a killed run left of a line

    def noted(self) -> list[dict[str, Any]]:
        """What ``note`` kept, the last of each matrix."""
        return list({item["name"]: item for item in _lines(self.path / "outcomes.jsonl")}.values())

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Keeps what the work inside took, also when it is interrupted; a killed process loses that of its stage."""
        start = time.perf_counter()
        try:
            yield
        finally:
            with open(self.path / "seconds.jsonl", "a", encoding="utf-8") as file:
                file.write("\n" + json.dumps({name: time.perf_counter() - start}))

    def seconds(self) -> dict[str, float]:
        """What all stages took so far, over all attempts."""
        found: dict[str, float] = {}
        for item in _lines(self.path / "seconds.jsonl"):
            for name, value in item.items():
                found[name] = found.get(name, 0.0) + value
        return found

    def _file(self, row: PlanRow) -> Path:
        """One file for what determines the codes."""
        what = hashlib.sha256(f"{row.name}\n{row.format}\n{row.solver}".encode()).hexdigest()[:16]
        return self.codes_folder / f"{row.name[:120].replace('/', '_')}-{what}.safetensors"

    def fresh_artifact(self) -> Path:
        """An empty folder to assemble the artifact in."""
        folder = self.path / "artifact"
        if folder.exists():
            shutil.rmtree(folder)
        folder.mkdir()
        return folder

    def publish(self) -> None:
        """Makes the assembled artifact the output, replacing an old one only now that the new is whole."""
        old = self.out.with_name(self.out.name + ".old")
        if self.out.exists():
            if old.exists():
                shutil.rmtree(old)
            os.replace(self.out, old)
        os.replace(self.path / "artifact", self.out)
        shutil.rmtree(self.path)
        if old.exists():
            shutil.rmtree(old)


def _lines(file: Path) -> Iterator[dict[str, Any]]:
    """Of a file of JSON lines, which may be absent."""
    if file.exists():
        for line in file.read_text(encoding="utf-8").splitlines():
            with suppress(ValueError):  # blank, or cut off when a run was killed
                yield json.loads(line)


def _store(weight: QTensor, file: Path) -> None:
    unfinished = file.with_suffix(".new")
    save_file({key: value.contiguous() for key, value in weight.pack().items()}, unfinished)
    os.replace(unfinished, file)


@contextmanager
def explain_full_disk(folder: Path, what_is_kept: str) -> Iterator[None]:
    """Turns the system's "no space left" into an error that says what to do."""
    try:
        yield
    except Exception as error:  # safetensors wraps the system's error in its own
        if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or "No space left" in str(error):
            raise PoiseError(f"the disk of {folder} is full; {what_is_kept}") from error
        raise
