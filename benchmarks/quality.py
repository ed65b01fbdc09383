"""What presets and peers lose: SmolLM2-135M-Instruct, all linears, groups of 64, at 4, 3 and 2 bits: docs/quality.json.

    python benchmarks/quality.py --text FILE [--bits 4 3 2] [--only poise peers balanced "gptqmodel gptaq"]

FILE is a development text such as the validation split of WikiText-2. Its first half calibrates, on its second half the
models are judged, and on a second domain that nothing was calibrated on: docstrings of torch and numpy. What is measured
stands in ``judging``. All start from one folder of float16 weights, so that all store 16-bit scales; peers get the first tokens of the text that Poise
gets, run in environments of their own (``benchmarks/peers/install.sh``) and hand back de-quantized weights.

Rows that were measured before on the same text are kept in docs/quality.json; ``--again`` measures them anew.
``--resume`` goes on with an interrupted run of Poise, which the same code has to have begun; its seconds are those of all
its parts.
A row that fails is told at the end, and the program exits with 1.
"""

import argparse
import hashlib
import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from safetensors.torch import save_file

from decoding import default_model
from judging import LENGTH, Judge, docstrings, halves, ratio
from poise.calibration.text import Text
from poise.checkpoints import open_checkpoint
from poise.core.precision import product_name
from poise.core.run import versions

HERE = Path(__file__).resolve().parent
WORK = Path("build/quality")
OUT = HERE.parent / "docs" / "quality.json"
DTYPE = "float16"
BARS = {("balanced", 4): 0.065, ("balanced", 3): 0.25, ("balanced", 2): 0.90} | {
    ("best", 4): 0.045,
    ("best", 3): 0.15,
    ("best", 2): 0.45,
}
PRESETS = ("rtn", "fast", "balanced", "best")
PEERS = {
    "hqq": ("hqq", "hqq"),
    "torchao affine": ("torchao", "affine"),
    "torchao hqq": ("torchao", "hqq"),
    "torchao hqq-scale": ("torchao", "hqq-scale"),
    "gptqmodel gptq": ("gptqmodel", "gptq"),
    "gptqmodel gptaq": ("gptqmodel", "gptaq"),
    "gptqmodel foem": ("gptqmodel", "foem"),
    "gptqmodel ordered": ("gptqmodel", "ordered"),
    "llm-compressor gptq": ("llmcompressor", "gptq"),
    "llm-compressor imatrix": ("llmcompressor", "imatrix"),
    "llm-compressor awq": ("llmcompressor", "awq"),
    "autoround light": ("autoround", "light"),
    "autoround default": ("autoround", "default"),
    "autoround extended": ("autoround", "extended"),
}
"""Name of a row: driver and recipe."""
RTN = """description: Rounded to nearest.
rules:
  - {{role: router, optional: true, keep: true}}
  - {{role: head, optional: true, keep: true}}
  - {{role: embedding, optional: true, keep: true}}
  - {{options: ["int(bits={bits}, group={group}, symmetric=False)"], solver: rtn}}
"""


@dataclass(frozen=True, kw_only=True)
class Material:
    """What every row starts from.

    Attributes:
        model: folder of the original, float16.
        text: file of the calibrating half, for Poise.
        tokens: file of its first tokens, for peers.
        key: hash of text and tokens; rows with another one are not reused.
        seed: of every random draw of a peer.
    """

    model: Path
    text: Path
    tokens: Path
    key: str
    seed: int


def prepare(text: str, tokens: int, seed: int) -> Material:
    """Writes model and calibration under build/quality."""
    WORK.mkdir(parents=True, exist_ok=True)
    original = open_checkpoint(default_model())
    windows = Text(name="calibration", content=text).windows(original.tokenizer(), LENGTH, tokens // LENGTH)
    key = hashlib.sha256(f"{original.fingerprint()} {DTYPE} {windows} {text}".encode()).hexdigest()[:16]
    file, ids, model = WORK / "calibration.txt", WORK / f"tokens-{key}.safetensors", WORK / f"model-{DTYPE}"
    file.write_text(text, encoding="utf-8")
    save_file({"calibration": torch.tensor(windows)}, ids)
    if not (model / "config.json").exists():
        model.mkdir(exist_ok=True)
        weights = {
            name: original.read(name).to(getattr(torch, DTYPE)).contiguous() for name in original.tensors()
        }
        save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
        for name, content in original.sidecars().items():
            (model / name).write_bytes(content)
        config = json.dumps(original.config | {"dtype": DTYPE}, indent=1)
        (model / "config.json").write_text(config + "\n", encoding="utf-8")
    return Material(model=model, text=file, tokens=ids, key=key, seed=seed)


def quantize(
    material: Material, preset: str, bits: int, group: int, resume: bool
) -> tuple[Path, dict[str, Any]]:
    """The exported model; seconds from the first token that is read to the last code, as peers count theirs; bits a weight
    of its linears."""
    out = WORK / f"{preset}-{bits}"
    wish = ["--preset", preset, "--bits", str(bits), "--group", str(group)]
    if preset == "rtn":
        recipe = WORK / f"rtn-{bits}.yaml"
        recipe.write_text(RTN.format(bits=bits, group=group), encoding="utf-8")
        wish = ["--recipe", str(recipe)]
    elif preset != "fast":
        wish += ["--calibration", str(material.text)]
    command = [
        "quantize",
        str(material.model),
        *wish,
        "--to",
        "compressed-tensors",
        "-o",
        str(out),
        "--force",
    ]
    if resume and out.with_name(f"{out.name}.partial").exists():
        command.append("--resume")
    done = subprocess.run(
        [sys.executable, "-m", "poise", *command, "--json"], check=True, stdout=subprocess.PIPE
    )
    (artifact,) = json.loads(done.stdout)["artifacts"]
    run = json.loads(Path(f"{out}.run.json").read_text(encoding="utf-8"))
    plan = json.loads((Path(artifact["model"]) / "plan.json").read_text(encoding="utf-8"))
    return Path(artifact["model"]), {
        "kind": "poise",
        "solver": next(row["solver"] for row in plan["rows"] if row["solver"]),
        "transforms": plan["transforms"],
        "tune": plan["tune"],
        "tokens": plan["tokens"],
        "on": product_name(),
        "stored": artifact["manifest"]["linear_bits_per_weight"],
        "seconds": sum(value for stage, value in run["stages"].items() if stage != "export"),
        "seconds_in_all": max(run["wall_seconds"], sum(run["stages"].values())),
    }


def drive(material: Material, name: str, bits: int, group: int) -> tuple[Path, dict[str, Any]]:
    """What a peer made of the model, in its own environment. A folder that is there for this material is taken as it is."""
    driver, recipe = PEERS[name]
    out = WORK / material.key / f"{driver}-{recipe}-{bits}"
    if not (out / "peer.json").exists():
        python = HERE.parent / ".venv-peers" / driver / "bin" / "python"
        if not python.exists():
            raise SystemExit(f"{name}: no environment; run bash benchmarks/peers/install.sh {driver}")
        command = [str(python), str(HERE / "peers" / f"{driver}.py")]
        command += [str(material.model), str(material.tokens), str(out)]
        command += [
            "--bits",
            str(bits),
            "--group",
            str(group),
            "--recipe",
            recipe,
            "--seed",
            str(material.seed),
        ]
        log = WORK / f"{driver}-{recipe}-{bits}.log"
        with open(log, "wb") as file:
            done = subprocess.run(command, stdout=file, stderr=subprocess.STDOUT)
        if done.returncode:
            raise subprocess.CalledProcessError(done.returncode, f"{name}: see {log}")
    facts = json.loads((out / "peer.json").read_text(encoding="utf-8"))
    wanted = ("stored", "seconds", "seconds_in_all", "version", "recipe", "settings", "seed", "peak_bytes")
    on = "GPU" if facts["settings"].get("device_map") == "cuda" else ""
    return out, {"kind": "peer", "on": on} | {fact: facts[fact] for fact in wanted}


def chosen(only: list[str] | None) -> list[str]:
    """Names of rows: all, those of ``poise`` or ``peers``, those of a driver, or single ones."""
    rows = [*PRESETS, *PEERS]
    groups = {"poise": list(PRESETS), "peers": list(PEERS)}
    groups |= {driver: [n for n, (d, _) in PEERS.items() if d == driver] for driver, _ in PEERS.values()}
    names = [name for wish in only or ["poise", "peers"] for name in groups.get(wish, [wish])]
    if unknown := sorted(set(names) - set(rows)):
        raise SystemExit(f"no row {unknown}; there is {', '.join(rows)}, and {', '.join(groups)}")
    return names


def against_best_peer(rows: list[dict[str, Any]]) -> None:
    """Adds to each row of Poise its divergence over that of the best peer of its width, for each text.

    Rows of tables that did not keep single windows cannot be compared with another peer than before.
    """
    for row in rows:
        peers = [other for other in rows if other["bits"] == row["bits"] and other["kind"] == "peer"]
        for text in ("held-out", "docstrings"):
            if row["kind"] != "poise" or not peers:
                continue
            best = min(peers, key=lambda other: other[text]["kl"])
            if all("each" in one[text] for one in (row, best)):
                value, low, high = ratio(row[text]["each"], best[text]["each"])
                found = {"ratio": value, "ratio_low": low, "ratio_high": high, "best_peer": best["preset"]}
                row[text] |= found
            elif row[text].get("best_peer") != best["preset"]:
                for key in ("ratio", "ratio_low", "ratio_high", "best_peer"):
                    row[text].pop(key, None)


def place(row: dict[str, Any]) -> tuple[str, int, str | None]:
    """What tells a row from others: presets do more where processors multiply bfloat16."""
    return row["preset"], row["bits"], row["on"] if row["kind"] == "poise" else None


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--text", type=Path, help="development text, UTF-8")
    parser.add_argument("--bits", type=int, nargs="+", default=[4, 3, 2])
    parser.add_argument("--only", nargs="+", help="poise, peers, a driver, or names of rows")
    parser.add_argument("--calibration-tokens", type=int, default=32768, help="for peers")
    parser.add_argument("--windows", type=int, default=24, help="of each text that is judged")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--again", action="store_true", help="measure rows that were measured before")
    parser.add_argument("--resume", action="store_true", help="go on with interrupted runs of Poise")
    arguments = parser.parse_args()
    if arguments.text is None or not arguments.text.is_file():
        raise SystemExit(
            "give --text FILE: the validation split of WikiText-2 as plain text (dataset Salesforce/wikitext, "
            "wikitext-2-raw-v1, on the Hugging Face hub)"
        )
    first, second = halves(arguments.text.read_text(encoding="utf-8"))
    material = prepare(first, arguments.calibration_tokens, arguments.seed)
    before = json.loads(OUT.read_text(encoding="utf-8"))["rows"] if OUT.exists() else []
    rows = {place(row): row for row in before if row["key"] == material.key}
    failed, judge = [], None
    for bits in arguments.bits:
        for name in chosen(arguments.only):
            here = product_name() if name in PRESETS else None
            if (name, bits, here) in rows and not arguments.again:
                continue
            try:
                if name in PEERS:
                    model, facts = drive(material, name, bits, 64)
                else:
                    model, facts = quantize(material, name, bits, 64, arguments.resume)
            except subprocess.CalledProcessError as error:
                failed.append(f"{name} at {bits} bits: {error}")
                continue
            texts = {"held-out": second, "docstrings": docstrings()}
            judge = judge or Judge(default_model(), texts, arguments.windows, WORK / "answers")
            row = {"preset": name, "bits": bits, "key": material.key, **facts, **judge.judge(model)}
            rows[place(row)] = row
            write(list(rows.values()), arguments)
    show(write(list(rows.values()), arguments))
    if failed:
        raise SystemExit("\n".join(failed))


def write(rows: list[dict[str, Any]], arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """The rows as they stand in the page, each compared with the best peer."""
    table = sorted(rows, key=lambda row: (-row["bits"], row["held-out"]["kl"]))
    against_best_peer(table)
    facts = {
        "versions": versions(),
        "calibration_tokens": arguments.calibration_tokens,
        "peers": list(PEERS),
        "rows": table,
    }
    OUT.write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
    return table


def show(rows: list[dict[str, Any]]) -> None:
    table = Table(
        "row",
        "bits",
        "stored",
        "seconds",
        "on",
        "KL held-out",
        "bar",
        "of best peer",
        "ppl",
        "top-1",
        "KL docstrings",
    )
    for row in rows:
        held, other = row["held-out"], row["docstrings"]
        bar = BARS.get((row["preset"], row["bits"]))
        table.add_row(
            row["preset"],
            str(row["bits"]),
            f"{row['stored']:.2f}",
            f"{row['seconds']:.0f}",
            row.get("on", ""),
            f"{held['kl']:.4f} ± {held['half']:.4f}",
            "" if bar is None else f"{bar} {'reached' if held['kl'] <= bar else 'MISSED'}",
            f"{held['ratio']:.2f} [{held['ratio_low']:.2f}, {held['ratio_high']:.2f}]"
            if "ratio" in held
            else "",
            f"{held['perplexity']:.2f} ({held['perplexity_original']:.2f})",
            f"{held['top1']:.3f}",
            f"{other['kl']:.4f} ± {other['half']:.4f}",
        )
    Console(width=160).print(table)


if __name__ == "__main__":
    main()
