"""Parts of docs/quality.md: what was measured stands in quality.json, second_model.json and solvers.json."""

import json
from pathlib import Path
from typing import Any

from poise.planning.presets import FEW, PRESETS, QUICK, preset_of

FOLDER = Path(__file__).parent


def parts() -> list[str]:
    """Paragraphs, headings and tables, in order."""
    found = [
        "What solvers and presets gain and cost. All figures come from the programs named below; the models, texts "
        "and protocols stand at their tops.",
        "## Presets",
        "`poise quantize MODEL --preset NAME --bits B --group G`. Embedding, head and routers are left alone. A processor that "
        "multiplies bfloat16 reads more text in the same time and trains longer; what a run did stands in its plan, and a recipe "
        "asks for it anywhere.",
        presets(),
    ]
    quality, second, solvers = (FOLDER / f"{name}.json" for name in ("quality", "second_model", "solvers"))
    if quality.exists():
        found += quality_parts(json.loads(quality.read_text(encoding="utf-8")))
    if second.exists():
        found += second_parts(json.loads(second.read_text(encoding="utf-8")))
    if solvers.exists():
        found += solver_parts(json.loads(solvers.read_text(encoding="utf-8")))
    return found


def presets() -> str:
    """What each preset does."""
    rows = ["| preset | transforms | solver | tokens | tuning | cost |", "|---|---|---|---:|---|---|"]
    both = {f"`{name}`": preset for name, preset in PRESETS.items()}
    both |= {f"`{name}` with bfloat16": preset for name, preset in QUICK.items()}
    both = {
        f"{name}{where}": preset
        for name, whole in both.items()
        for where, preset in (("", whole), (f", {FEW} bits", whole.few))
        if preset is not None
    }
    for name, preset in both.items():
        tuning = f"`{preset.tune}`" if preset.tune else "none"
        tuning += f" up to {preset.tune_up_to / 1e6:.0f} million weights" if preset.tune_up_to else ""
        before = ", ".join(f"`{spec}`" for spec in preset.transforms) or "none"
        rows.append(f"| {name} | {before} | `{preset.solver}` | {preset.tokens} | {tuning} | {preset.cost} |")
    return "\n".join(rows)


def quality_parts(facts: dict[str, Any]) -> list[str]:
    """The table of `make bench-quality`."""
    rows = [
        "| | bits | stored bits | seconds | on | KL, held-out | of the best peer | top-1 | KL, docstrings |",
        "|---|---:|---:|---:|---|---:|---:|---:|---:|",
    ]
    for row in facts["rows"]:
        held, other = row["held-out"], row["docstrings"]
        name = f"**`{row['preset']}`**" if row["kind"] == "poise" else f"{row['preset']} {row['version']}"
        share = (
            f"{held['ratio']:.2f} [{held['ratio_low']:.2f}, {held['ratio_high']:.2f}]"
            if "ratio" in held
            else ""
        )
        rows.append(
            f"| {name} | {row['bits']} | {row['stored']:.2f} | {row['seconds']:.0f} "
            f"| {row.get('on', '')} | {held['kl']:.4f} ± {held['half']:.4f} | {share} | {held['top1']:.3f} | {other['kl']:.4f} ± {other['half']:.4f} |"
        )
    older = [*changed_since(facts["rows"]), *not_measured(facts)]
    count = facts["rows"][0]["held-out"]["windows"]
    return [
        "## What they lose",
        f"`make bench-quality TEXT=FILE`, SmolLM2-135M-Instruct, {count} windows of 512 tokens, two cores. KL divergence to "
        "the original in nats a token, with 95 % intervals. `held-out` is the half of the text that was not calibrated on, "
        "`docstrings` another domain. Peers that calibrate got the first 32768 tokens of the other half; "
        "presets read as many as the first table says. They ran in environments of their own (`benchmarks/peers/`). Ratios are of the same windows, with 95 % bootstrap intervals. "
        "Seconds are of the quantization, reading of text included; those of peers are without loading and writing the model. Rows "
        "were measured on more than one processor, so that seconds compare roughly; lab.md has `fast` beside HQQ in one run. `on` says "
        "what Poise's products were made of, which decides how much its presets do, and which peers ran on a GPU.",
        "\n".join(rows),
        *older,
    ]


def not_measured(facts: dict[str, Any]) -> list[str]:
    """A sentence on the peers' recipes that are driven but stand in no row."""
    known = {(row["preset"], row["bits"]) for row in facts["rows"]}
    widths = sorted({bits for _, bits in known}, reverse=True)
    lacking = {name: [bits for bits in widths if (name, bits) not in known] for name in facts["peers"]}
    told = [f"{name} at {', '.join(map(str, bits))}" for name, bits in lacking.items() if bits]
    return (
        [f"Not measured, so that the best peer may be better, at these bits: {'; '.join(told)}."]
        if told
        else []
    )


def changed_since(rows: list[dict[str, Any]]) -> list[str]:
    """The rows whose preset is another by now, with what it was."""
    told = []
    for row in rows:
        if row["preset"] not in PRESETS:
            continue
        on = row.get("on", "float32")
        preset = preset_of(row["preset"], on == "bfloat16").at(row["bits"])
        was = {"transforms": ", ".join(row.get("transforms", ()))}
        was |= {key: row[key] for key in ("solver", "tokens", "tune") if key in row}
        now = vars(preset) | {"transforms": ", ".join(preset.transforms)}
        changed = [
            f"{key} {f'`{value}`' if value else 'none'}" for key, value in was.items() if value != now[key]
        ]
        if changed:
            told.append(f"| `{row['preset']}` | {row['bits']} | {on} | {', '.join(changed)} |")
    if not told:
        return []
    head = ["| | bits | on | measured with |", "|---|---:|---|---|"]
    return ["Rows whose preset is another by now:", "\n".join(head + told)]


def second_parts(facts: dict[str, Any]) -> list[str]:
    """The table of benchmarks/second_model.py."""
    rows = [
        "| | grid | stored bits | runs in | seconds | on | KL, held-out | top-1 | KL, docstrings |",
        "|---|---|---:|---|---:|---|---:|---:|---:|",
    ]
    for row in facts["rows"]:
        held, other = row["held-out"], row["docstrings"]
        rows.append(
            f"| `{row['preset']}` | {row['bits']} bits, groups of {row['group']} | {row['stored']:.2f} | {row['runs_in']} "
            f"| {row['seconds']:.0f} | {row.get('on', 'float32')} | {held['kl']:.4f} ± {held['half']:.4f} | {held['top1']:.3f} "
            f"| {other['kl']:.4f} ± {other['half']:.4f} |"
        )
    return [
        "## On another architecture",
        f"`python benchmarks/second_model.py`, {facts['model']}, {facts['windows']} windows of 512 tokens, two cores. The same "
        "figures, of what transformers loads through compressed-tensors and of what llama.cpp loads; the original is computed "
        "by transformers in float32.",
        "\n".join(rows),
        *changed_since(facts["rows"]),
    ]


def solver_parts(facts: dict[str, Any]) -> list[str]:
    """The table of `make bench-solvers`."""
    names = [f"`{name}`" for name in facts["solvers"]]
    rows = [f"| format | bits | {' | '.join(names)} |", "|---|---:|" + "---:|" * len(names)]
    for row in facts["formats"]:
        rows.append(
            f"| `{row['spec']}` | {row['bits']:.2f} | {' | '.join(f'{error:.3g}' for error in row['errors'])} |"
        )
    left_out = "; ".join(f"`{spec}`: {reason}" for spec, reason in facts["except"].items())
    return [
        "## Error feedback in every format",
        f"`make bench-solvers`: E|(W - W') x|^2 / E|W x|^2 of {facts['rows']} rows of `{facts['layer']}`, with the Hessian of "
        f"{facts['tokens']} tokens. Exceptions: {left_out}.",
        "\n".join(rows),
    ]
