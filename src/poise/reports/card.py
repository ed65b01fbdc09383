"""The model card of an artifact: what it is, how it was made, what it loses."""

from jinja2 import Environment, PackageLoader, StrictUndefined

from poise.core.artifact import Manifest
from poise.core.comparison import Comparison
from poise.core.plan import Plan
from poise.reports.figures import human, interval

TEMPLATES = Environment(
    loader=PackageLoader("poise.reports", "templates"),
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)
TEMPLATES.globals.update(human=human, interval=interval)


def model_card(manifest: Manifest, plan: Plan, comparison: Comparison | None) -> str:
    """Markdown with the metadata that model hubs read; figures once the artifact was evaluated."""
    formats: dict[str, int] = {}
    for row in plan.rows:
        formats[row.format or "kept"] = formats.get(row.format or "kept", 0) + 1
    template = TEMPLATES.get_template("card.md.jinja")
    return template.render(manifest=manifest, plan=plan, formats=formats, comparison=comparison)
