"""Peak memory of quantizing 3 billion weights, and that it does not grow with the number of layers.

    python benchmarks/memory.py [--layers 14 28] [--folder FOLDER]
    python benchmarks/memory.py --preset balanced --layers 3 --exporters compressed-tensors --calibration FILE

Bar: 1.5 GB plus twice the largest tensor; 4 GB for a preset, and the estimate of --dry-run within 20 %. FILE is any text, as
long as the preset reads; without it the model writes its own. Each run is a process of its own; the peak is its VmHWM. The
checkpoint (6.4 GB at 28 layers) and the artifacts are written to the folder and removed afterwards.
"""

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from synthetic import make_checkpoint

LARGEST = 128256 * 3072 * 2
BAR = 1.5e9 + 2 * LARGEST
PRESET_BAR = 4e9
RECIPE = Path(__file__).parent / "rtn4.yaml"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, nargs="+", default=[14, 28])
    parser.add_argument("--exporters", nargs="+", default=["compressed-tensors", "gguf"])
    parser.add_argument("--preset", help="instead of rounding to nearest")
    parser.add_argument("--calibration", help="text for a preset that reads")
    parser.add_argument("--folder", type=Path, default=None)
    arguments = parser.parse_args()
    work = Path(tempfile.mkdtemp(dir=arguments.folder))
    bar = PRESET_BAR if arguments.preset else BAR
    wish = ["--preset", arguments.preset] if arguments.preset else ["--recipe", str(RECIPE)]
    if arguments.calibration:
        wish += ["--calibration", arguments.calibration]
    print(f"bar: {bar / 1e9:.2f} GB")
    print(
        f"{'exporter':<20}{'layers':>7}{'source GB':>11}{'peak GB':>9}{'of the bar':>12}{'of dry run':>12}"
        f"{'seconds':>9}{'of dry run':>12}{'MB/s':>7}"
    )
    peaks: dict[str, list[float]] = {}
    try:
        for layers in arguments.layers:
            source = make_checkpoint(work / "source", layers)
            size = sum(file.stat().st_size for file in source.glob("*.safetensors"))
            for exporter in arguments.exporters:
                told = dry_run(source, exporter, work / "out", wish)
                peak, seconds = quantize(source, exporter, work / "out", wish)
                peaks.setdefault(exporter, []).append(peak)
                rate = size / seconds / 1e6
                print(
                    f"{exporter:<20}{layers:>7}{size / 1e9:>11.2f}{peak / 1e9:>9.2f}{peak / bar:>12.2f}"
                    f"{peak / told['memory']:>12.2f}{seconds:>9.1f}{seconds / told['seconds']:>12.2f}{rate:>7.0f}",
                    flush=True,
                )
    finally:
        shutil.rmtree(work)
    for exporter, found in peaks.items():
        print(f"{exporter}: deepest over shallowest peak {found[-1] / found[0]:.3f}")


def dry_run(source: Path, exporter: str, out: Path, wish: list[str]) -> dict[str, float]:
    """The estimate of one run."""
    command = [sys.executable, "-m", "poise", "quantize", str(source), *wish]
    done = subprocess.run(
        [*command, "--to", exporter, "-o", str(out), "--dry-run", "--json"],
        check=True,
        stdout=subprocess.PIPE,
    )
    found: dict[str, float] = json.loads(done.stdout)["estimates"][0]
    return found


def quantize(source: Path, exporter: str, out: Path, wish: list[str]) -> tuple[float, float]:
    """Peak bytes and seconds of one run in a fresh process."""
    start = time.perf_counter()
    command = [sys.executable, "-m", "poise", "quantize", str(source), *wish]
    subprocess.run(
        [*command, "--to", exporter, "-o", str(out), "--force", "--json"],
        check=True,
        stdout=subprocess.DEVNULL,
    )
    seconds = time.perf_counter() - start
    record = json.loads(out.with_name(out.name + ".run.json").read_text())
    shutil.rmtree(out)
    return record["peak_memory"], seconds


if __name__ == "__main__":
    main()
