"""The stages in their order; nothing else knows it."""

from poise.pipeline.choose import choose
from poise.pipeline.estimate import Estimate
from poise.pipeline.evaluate import bench, evaluate, probe
from poise.pipeline.formats import examine
from poise.pipeline.quantize import dry_run, quantize

__all__ = ["Estimate", "bench", "choose", "dry_run", "evaluate", "examine", "probe", "quantize"]
