"""poise doctor: what this machine and environment can do."""

import importlib.util
import json
import os
import shutil
import sys
from dataclasses import asdict, dataclass
from typing import Annotated

import typer
from rich.markup import escape

from poise.cli import terminal

ENVIRONMENT_MISSING = 5


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One line: what was looked at, whether it is good, and what to do if not."""

    what: str
    found: str
    ok: bool = True
    advice: str = ""


def run(as_json: Annotated[bool, typer.Option("--json", help="print JSON, for bug reports")] = False) -> None:
    """Check the environment: versions, engines, memory, disk. Exit code 5 if Python is too old."""
    findings = [*_packages(), *_engines(), *_machine()]
    if as_json:
        print(json.dumps({"schema_version": 1, "findings": [asdict(f) for f in findings]}, indent=1))
    else:
        for finding in findings:
            mark = "[green]ok[/]  " if finding.ok else "[yellow]miss[/]"
            advice = f"  ->  {escape(finding.advice)}" if finding.advice else ""
            terminal.out.print(f"{mark} {finding.what}: {escape(finding.found)}{advice}")
    if any(not finding.ok for finding in findings if finding.what == "python"):
        raise typer.Exit(ENVIRONMENT_MISSING)


def _packages() -> list[Finding]:
    from poise.core.run import versions

    new_enough = sys.version_info >= (3, 11)
    python = Finding(
        what="python",
        found=sys.version.split()[0],
        ok=new_enough,
        advice="" if new_enough else "use 3.11 or newer",
    )
    return [
        python,
        *(Finding(what=name, found=number) for name, number in versions().items() if name != "python"),
    ]


def _engines() -> list[Finding]:
    present = importlib.util.find_spec("xllamacpp") is not None
    advice = "" if present else "pip install 'poise[llamacpp]' to run GGUF files in llama.cpp"
    return [
        Finding(
            what="engine llamacpp",
            found="installed" if present else "not installed",
            ok=present,
            advice=advice,
        )
    ]


def _machine() -> list[Finding]:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    free = shutil.disk_usage(".").free
    findings = [
        Finding(what="cores", found=str(cores)),
        Finding(what="free disk here", found=f"{free / 1e9:.1f} GB"),
    ]
    if hasattr(os, "sysconf") and "SC_AVPHYS_PAGES" in os.sysconf_names:
        memory = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        findings.append(Finding(what="free memory", found=f"{memory / 1e9:.1f} GB"))
    offline = os.environ.get("HF_HUB_OFFLINE", "0") not in ("", "0")
    return [
        *findings,
        Finding(what="hub", found="offline (HF_HUB_OFFLINE)" if offline else "reachable when asked for"),
    ]
