"""The stages in their order; nothing else knows it."""

from poise.pipeline.choose import choose
from poise.pipeline.compare import compare
from poise.pipeline.estimate import Estimate
from poise.pipeline.evaluate import evaluate
from poise.pipeline.formats import examine
from poise.pipeline.quantize import dry_run, quantize
from poise.pipeline.subjects import bench, probe

__all__ = ["Estimate", "bench", "choose", "compare", "dry_run", "evaluate", "examine", "probe", "quantize"]
