"""Poise: quantizes large language models and proves what was lost.

``poise.quantize``, ``poise.evaluate``, ``poise.compare`` and ``poise.bench`` are what the command line calls.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from poise.pipeline import bench, compare, dry_run, evaluate, quantize

__all__ = ["bench", "compare", "dry_run", "evaluate", "quantize"]


def __getattr__(name: str) -> Any:
    """Loads torch and the rest only when something is used."""
    if name in __all__:
        from poise import pipeline

        return getattr(pipeline, name)
    raise AttributeError(f"module 'poise' has no attribute {name!r}")
