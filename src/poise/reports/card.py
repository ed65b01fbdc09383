"""The model card of an artifact: what it is, how it was made, what it loses."""

from typing import Any

import yaml
from jinja2 import Environment, PackageLoader, StrictUndefined

from poise.core.artifact import Manifest
from poise.core.comparison import Comparison
from poise.core.plan import Plan
from poise.core.verdict import Row, Verdict
from poise.reports.figures import beside, human, interval, plain, span

TEMPLATES = Environment(
    loader=PackageLoader("poise.reports", "templates"),
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)
TEMPLATES.globals.update(beside=beside, human=human, interval=interval, plain=plain, span=span)


def model_card(
    manifest: Manifest,
    plan: Plan,
    comparison: Comparison | None = None,
    judged: tuple[Verdict, Row] | None = None,
) -> str:
    """Markdown with the metadata that model hubs read; figures once the artifact was evaluated, or compared and judged."""
    formats: dict[str, int] = {}
    for row in plan.rows:
        formats[row.format or "kept"] = formats.get(row.format or "kept", 0) + 1
    template = TEMPLATES.get_template("card.md.jinja")
    return template.render(
        manifest=manifest, plan=plan, formats=formats, comparison=comparison, judged=judged
    )


def eval_results(verdict: Verdict, row: Row) -> str | None:
    """``.eval_results/*.yaml`` of the Hugging Face hub: figures on data sets of the hub; None if no text was one."""
    from huggingface_hub import EvalResultEntry, eval_result_entries_to_yaml

    hub = {item["name"] for item in verdict.data if item["kind"] == "text" and "/" in item["name"]}
    protocol = f"poise compare, protocol {verdict.facts['protocol']}, against {verdict.original.label}"
    entries = [
        EvalResultEntry(
            dataset_id=part.name.removeprefix("hf://"),
            task_id="kl_divergence",
            value=part.value,
            notes=protocol,
        )
        for part in row.parts.get("domain", ())
        if part.name in hub
    ]
    if not entries:
        return None
    found: list[dict[str, Any]] = eval_result_entries_to_yaml(entries)
    text: str = yaml.safe_dump(found, sort_keys=False)
    return text
