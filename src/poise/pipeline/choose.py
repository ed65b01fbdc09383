"""Documents of a source -> the ones to calibrate on, with reasons and coverage."""

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from poise.calibration.language import languages
from poise.calibration.selection import Choice, Coverage, coverage, doubles, random_coverage, select
from poise.calibration.text import Text, load_text
from poise.checkpoints import open_checkpoint
from poise.core.artifact import write_atomically
from poise.core.errors import UsageError
from poise.pipeline.blocks import Blocks
from poise.pipeline.progress import Progress, silent

BATCH = 8
"""Windows that a block reads at a time."""


@dataclass(frozen=True, kw_only=True)
class Selection:
    """What was chosen of a source.

    Attributes:
        texts: of the chosen windows, in the order of the source.
        choices: number among the candidates and reason, one a text.
        candidates: windows of the source; ``doubles`` of them were left out.
        foreign: windows that were left out for their language, by language.
        chosen, random: coverage by the choice, and by random choices of as many.
    """

    texts: tuple[str, ...]
    choices: tuple[Choice, ...]
    candidates: int
    doubles: int
    foreign: dict[str, int]
    chosen: Coverage
    random: Coverage


def choose(
    model: str | Path,
    source: str | Path,
    out: str | Path | None = None,
    *,
    windows: int = 32,
    length: int = 512,
    method: str = "coverage",
    domain: str | Path | None = None,
    language: Sequence[str] = (),
    seed: int = 0,
    progress: Progress = silent,
) -> Selection:
    """Chooses windows of a source for calibration.

    Args:
        model: what reads them; its hidden states in the middle of the stack say what is alike.
        source: text or JSON lines.
        out: JSON lines to write, which ``quantize`` takes as its calibration; each with source, place and reason.
        windows: that are wanted, of ``length`` tokens.
        method: ``coverage``, ``cluster`` or ``random``.
        domain: text like that which the model will be asked; only windows near to it compete.
        language: codes such as ``en``: only windows in one of these compete. All, if there is none.

    Raises:
        MissingExtra: the library that tells languages apart is not installed.
        UsageError: a file cannot be used, a language is not known, or there are fewer windows than are wanted.
    """
    checkpoint = open_checkpoint(model)
    tokenizer = checkpoint.tokenizer()
    length = min(length, checkpoint.context or length)
    text = load_text(source, "calibration", tokenizer)
    cut = text.windows(tokenizer, length)
    if len(cut) < windows or len({len(window) for window in cut}) > 1:
        raise UsageError(
            f"{text.name} has {len(cut)} windows of {length} tokens, {windows} are wanted: give more text, or fewer or "
            "shorter windows"
        )
    opening = len(tokenizer("")["input_ids"][:1])
    texts = [tokenizer.decode(window[opening:]) for window in cut]
    spoken = languages(texts, language) if language else []
    foreign = Counter(code for code in spoken if code not in language)
    mine = [number for number in range(len(cut)) if not spoken or spoken[number] in language]
    twice = doubles([texts[number] for number in mine])
    kept = [number for place, number in enumerate(mine) if place not in twice]
    if len(kept) < windows and foreign:
        raise UsageError(
            f"{text.name} has {len(kept)} windows in {', '.join(language)}, {windows} are wanted; others are in "
            + ", ".join(f"{code} ({n})" for code, n in foreign.most_common())
        )
    blocks = Blocks(checkpoint)
    states = _states(blocks, [cut[number] for number in kept], progress)
    near = None
    if domain is not None:
        sample: Text = load_text(domain, "calibration", tokenizer)
        near = _states(blocks, sample.windows(tokenizer, length), progress)
    picked = sorted(
        select(states, windows, method=method, domain=near, seed=seed), key=lambda choice: choice.index
    )
    indices = [choice.index for choice in picked]
    selection = Selection(
        texts=tuple(texts[kept[index]] for index in indices),
        choices=tuple(Choice(index=kept[choice.index], reason=choice.reason) for choice in picked),
        candidates=len(cut),
        doubles=len(twice),
        foreign=dict(foreign.most_common()),
        chosen=coverage(states, indices),
        random=random_coverage(states, len(indices)),
    )
    if out is not None:
        lines = [
            json.dumps({"text": text_, "source": text.name, "window": choice.index, "reason": choice.reason})
            for text_, choice in zip(selection.texts, selection.choices, strict=True)
        ]
        write_atomically(Path(out), "\n".join(lines) + "\n")
    return selection


def _states(blocks: Blocks, windows: list[list[int]], progress: Progress) -> Tensor:
    """Mean hidden states in the middle of the stack, [windows, hidden]."""
    hidden = list(blocks.begin(windows, BATCH))
    half = max(1, len(blocks) // 2)
    for index in range(half):
        blocks.open(index)
        hidden = [blocks.run(part) for part in hidden]
        progress("read candidates", index + 1, half)
    blocks.close()
    return torch.cat([part.mean(1) for part in hidden])
