"""What a run would do and need, told before anything is done."""

import math
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from poise.calibration.generated import TEXTS
from poise.core.checkpoint import Checkpoint
from poise.core.linear import Linear
from poise.core.plan import Plan, PlanRow
from poise.core.precision import product_dtype
from poise.core.registry import build
from poise.core.run import peak_memory
from poise.core.stats import Stats
from poise.pipeline.blocks import rounded_products
from poise.pipeline.passes import READ, can_wait, held, room
from poise.pipeline.reading import Reading, reads, tokens_of, wants_hessian
from poise.pipeline.spool import MEMORY
from poise.pipeline.stream import BATCH_TOKENS

COPY_RATE = 150e6
"""Source bytes a second that reading, writing and reading back take together, beside the solving."""
SHARD = 500_000_000
"""Bytes an exporter may hold before it writes."""
LIBRARIES = 350_000_000
"""Bytes of transformers' model code and compiled loops, which a dry run does not load."""
REREAD = 2.4
"""Block passes of the quantized stream where no run can wait: as far as each input group, and once to the end."""
BESIDE = 2.0
"""Time of reading a block over that of its products alone: attention and what is done element by element."""
BESIDE_TRAINING = 3.3
"""Likewise of a step of training, whose products are in bfloat16 where the processor can."""
WRITING = 2
"""Layers of a block that write to the residual stream, which is kept for each."""
WRITE_RATE = 3e9
"""Bytes of weights and cache a second that writing text reads."""
KEPT = 16
"""Bytes a weight of the state from which training goes on: places, the best ones, Adam's two means."""
PASSES = 6
"""Operations with each weight for a token of training: forward and backward."""


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """What a run would do and need, told before anything is done.

    Attributes:
        seconds: solving time, from a sample of every distinct (solver, format); writing text, reading, training, copying.
        memory: peak resident bytes of the process.
        disk: bytes that are written, unfinished state included.
    """

    out: Path
    plan: Plan
    source_bytes: int
    artifact_bytes: int
    seconds: float
    memory: int
    disk: int
    free_disk: int


def artifact_bytes(checkpoint: Checkpoint, plan: Plan) -> int:
    """Bytes of all tensors as they are planned."""
    planned = {row.name: row for row in plan.quantized}
    total = 0.0
    for name, info in checkpoint.tensors().items():
        row = planned.get(name)
        if row is None:
            total += info.numel * checkpoint.dtype.itemsize
        else:
            total += build("format", str(row.format)).bits_per_weight(row.rows, row.columns) * info.numel / 8
    return int(total)


def free_disk(path: Path) -> int:
    """Bytes that are free where a path is or will be."""
    existing = next(parent for parent in (path.absolute(), *path.absolute().parents) if parent.exists())
    return shutil.disk_usage(existing).free


def estimate(checkpoint: Checkpoint, plan: Plan, out: Path, reading: Reading) -> Estimate:
    """Reads headers and the calibration text; rates of this machine are measured for a second or two."""
    size = artifact_bytes(checkpoint, plan)
    infos = checkpoint.tensors()
    largest = max(infos[row.name].nbytes + 2 * infos[row.name].numel for row in plan.rows)
    seconds, memory, spilled = _reading_cost(checkpoint, plan, reading)
    return Estimate(
        out=out,
        plan=plan,
        source_bytes=checkpoint.total_bytes,
        artifact_bytes=size,
        seconds=_solving_seconds(plan) + checkpoint.total_bytes / COPY_RATE + seconds,
        memory=peak_memory() + max(largest + SHARD, memory),
        disk=2 * size + spilled,
        free_disk=free_disk(out),
    )


def _reading_cost(checkpoint: Checkpoint, plan: Plan, reading: Reading) -> tuple[float, int, int]:
    """Seconds, bytes of memory and bytes of disk that writing text, reading it and training take."""
    if not reads(plan):
        return 0.0, 0, 0
    tokens = min(tokens_of(plan), (len(reading.given) + reading.lacking) * reading.length)
    linears = {linear.name: linear for linear in checkpoint.linears()}
    blocks: dict[int, list[Linear]] = {}
    for linear in linears.values():
        if linear.block is not None:
            blocks.setdefault(linear.block, []).append(linear)
    weights = sum(linear.numel for block in blocks.values() for linear in block)
    everything = sum(info.numel for info in checkpoint.tensors().values())
    most = room(checkpoint, plan)
    passes, products = 1.0, 0.0
    planned = {row.name: row for row in plan.quantized}
    groups = {linears[name].input_group: linears[name].columns for name in planned}
    if wants_hessian(plan):
        waits = all(can_wait(block, tokens, most) for block in blocks.values())
        passes += 1.0 if waits else REREAD
        products = sum(2.0 * columns**2 for columns in groups.values())
    seconds = BESIDE * 2 * tokens * (weights * passes + products) / _rate(torch.float32)
    memory, spilled = _stream_memory(list(blocks.values()), planned, tokens, wants_hessian(plan), most)
    if reading.lacking:
        width = sum(
            linear.rows for linear in linears.values() if linear.role in ("attention.k", "attention.v")
        )
        size = product_dtype().itemsize
        cache = size * width * reading.length * min(TEXTS, reading.lacking)
        rounds = math.ceil(reading.lacking / TEXTS) * reading.length
        seconds += rounds * (size * everything + cache / 2) / WRITE_RATE
        memory = max(memory, size * everything + cache + LIBRARIES)
    if plan.tune is not None:
        from poise.training.distill import TAUGHT, distill_of

        steps = distill_of(plan.tune)
        read = (len(reading.given) + reading.lacking) * reading.length
        head = max((linear.numel for linear in linears.values() if "head" in linear.roles), default=0)
        work = (2 * read + steps.steps * steps.batch * PASSES) * (weights + head)
        seconds += BESIDE_TRAINING * work / _rate(product_dtype())
        width = min(linear.columns for block in blocks.values() for linear in block)
        hidden = 2 * width * (len(blocks) // TAUGHT) * read if steps.hidden else 0
        spilled = max(spilled, hidden + (KEPT * weights if steps.code_rate else 0))
        memory = max(memory, steps.memory(checkpoint))
    return seconds, memory, spilled


def _stream_memory(
    blocks: Sequence[Sequence[Linear]], planned: dict[str, PlanRow], tokens: int, hessian: bool, most: int
) -> tuple[int, int]:
    """Bytes of memory and disk of the widest block: its weights, hidden states, statistics and their factor; runs may hold
    ``most``."""
    widest, spilled = 0, 0
    for block in blocks:
        hidden = min(linear.columns for linear in block)
        states = 4 * tokens * hidden
        largest = max(linear.numel for linear in block)
        need = 4 * sum(linear.numel for linear in block) + 10 * largest
        need += min(states, MEMORY) * (1 + hessian)
        need += 4 * BATCH_TOKENS * (max(linear.rows + linear.columns for linear in block) * 2)
        disk = max(0, states - MEMORY) * (1 + hessian)
        groups = {linear.input_group: linear.columns for linear in block if linear.name in planned}
        if hessian and groups:
            n = max(groups.values())
            need += held(block, tokens) if can_wait(block, tokens, most) else 0
            need += sum(min(4 * tokens * columns, READ) for columns in groups.values())
            disk += sum(max(0, 4 * tokens * columns - READ) for columns in groups.values())
            need += n * n * (4 + 4 + 8 + 4)  # both moments; the factor in float64, and as it is kept
            # The residual stream where layers write to it, its drift, and what the last of them reads.
            kept = [states] * (WRITING + 1) + [4 * tokens * n]
            need += sum(min(size, READ) for size in kept) + 4 * largest
            disk += sum(max(0, size - READ) for size in kept)
        widest, spilled = max(widest, need), max(spilled, disk)
    return widest + LIBRARIES, spilled


def _rate(dtype: torch.dtype) -> float:
    """Floating-point operations a second of a product of matrices, as blocks are read and trained; timed here."""
    x, w = torch.ones(1024, 2048, dtype=dtype), torch.ones(2048, 2048, dtype=dtype)
    with rounded_products():
        x @ w
        start = time.perf_counter()
        x @ w
        return 2 * x.numel() * 2048 / (time.perf_counter() - start)


def _solving_seconds(plan: Plan) -> float:
    """Times every distinct (solver, format) on one slab of random weights."""
    weights: dict[tuple[str, str], int] = {}
    for row in plan.quantized:
        key = (str(row.solver), str(row.format))
        weights[key] = weights.get(key, 0) + row.rows * row.columns
    total = 0.0
    sample = torch.randn(1024, 1024, generator=torch.Generator().manual_seed(0))
    moment = sample.T @ sample / 1024 + torch.eye(1024)
    stats = Stats(
        second_moment=moment.diagonal().clone(), hessian=moment, cross=moment, n_tokens=4096, data_hash=""
    )
    for (solver, format), count in weights.items():
        build("solver", solver).solve(sample[:8], build("format", format), stats)
        start = time.perf_counter()
        build("solver", solver).solve(sample, build("format", format), stats)
        total += (time.perf_counter() - start) * count / sample.numel()
    return total
