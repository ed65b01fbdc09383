"""Provenance: what was run, from what, with which versions, and what it cost."""

import ctypes
import os
import platform
import resource
import subprocess
import sys
import time
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

PACKAGES = ("torch", "transformers", "safetensors", "gguf", "compressed-tensors", "numpy", "xllamacpp")

PIECE = 1 << 24
"""Bytes of a piece of memory that is worth giving back."""
_M_MMAP_THRESHOLD, _M_TRIM_THRESHOLD = -3, -1  # of malloc.h


def versions() -> dict[str, str]:
    """Versions of Poise, Python and the packages whose behaviour shapes results."""
    found = {"poise": poise_version(), "python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def poise_version() -> str:
    """Version of the installed distribution."""
    try:
        return version("poise")
    except PackageNotFoundError:
        return "unknown"


def commit() -> tuple[str | None, bool]:
    """Commit of a source checkout and whether it has uncommitted changes; (None, False) when installed."""
    root = Path(__file__).parents[3]
    if not (root / "pyproject.toml").is_file():
        return None, False
    try:
        head = subprocess.run(
            ["git", "rev-parse", "HEAD"], cwd=root, capture_output=True, text=True, check=True
        )
        changed = subprocess.run(
            ["git", "status", "--porcelain", "--untracked-files=no"],
            cwd=root,
            capture_output=True,
            text=True,
            check=True,
        )
    except (OSError, subprocess.CalledProcessError):
        return None, False
    return head.stdout.strip(), bool(changed.stdout.strip())


def peak_memory() -> int:
    """Largest resident set of this process so far, bytes.

    Linux counts it from the start of the program; ``ru_maxrss`` would include the parent's before exec.
    """
    return _status("VmHWM") or _peak_by_usage()


def resident_memory() -> int:
    """Resident set of this process now, bytes; its peak where the system does not tell."""
    return _status("VmRSS") or _peak_by_usage()


def return_freed_memory() -> None:
    """From now on, what was freed in pieces of ``PIECE`` bytes or more goes back to the system at once, where the C library
    is glibc.

    Left alone it keeps pieces of up to 32 MB for later, which are the activations of a wide layer: a gigabyte.
    """
    if sys.platform == "linux" and (mallopt := getattr(ctypes.CDLL(None), "mallopt", None)):
        mallopt(_M_MMAP_THRESHOLD, PIECE)
        mallopt(_M_TRIM_THRESHOLD, 2 * PIECE)


def available_memory() -> int:
    """Bytes that programs can still take, bytes; all of the machine's where the system does not tell."""
    free = _status("MemAvailable", "/proc/meminfo")
    return free or os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _status(key: str, file: str = "/proc/self/status") -> int:
    try:
        lines = Path(file).read_text().splitlines()
    except OSError:
        return 0
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith(key)), 0)


def _peak_by_usage() -> int:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


@dataclass(kw_only=True)
class Run:
    """The record of one run. Times and memory are about this run, so it stays out of artifacts.

    Attributes:
        stages: seconds of the parts of the work, those of earlier attempts that were interrupted included.
    """

    command: str
    inputs: dict[str, str]
    seed: int = 0
    versions: dict[str, str] = field(default_factory=versions)
    machine: str = field(default_factory=lambda: f"{platform.system()} {platform.machine()}")
    started: float = field(default_factory=time.time)
    wall_seconds: float = 0.0
    peak_memory: int = 0
    stages: dict[str, float] = field(default_factory=dict)
    matrices: list[dict[str, Any]] = field(default_factory=list)

    def finish(self) -> None:
        self.wall_seconds = time.time() - self.started
        self.peak_memory = peak_memory()
