"""Writes the pages of the documentation that follow from the code.

    python docs/generate.py            write them
    python docs/generate.py --check    exit with 1 and name the page that is out of date

``grid.md`` comes from the answers of the exporters, ``cli.md`` from the commands, ``recipes.md`` from the
recipes that come with Poise, ``formats.md`` and its pictures from the formats and from stored measurements. The text is
the same in every terminal.
"""

import argparse
import sys
from collections.abc import Callable
from importlib import resources
from pathlib import Path
from textwrap import fill

FOLDER = Path(__file__).parent
WIDTH = 100
NOTE = "<!-- Written by docs/generate.py: change the code, then run `make docs`. -->"


def grid_page() -> str:
    """Every number format against every exporter, and what reads the result."""
    from poise.planning.grid import engines, grid

    intro = (
        "Each cell is the answer of the exporter for the weight of a feed-forward layer with 4096 inputs and "
        "4096 outputs: yes, or the reason why not. A planner sees the same answers, matrix by matrix, so other "
        "shapes and roles can get others; `poise quantize --dry-run` shows them for a model. Bits per weight "
        "count scales, zero points and padding, with 16-bit scales."
    )
    return _page("Formats and exporters", _wrap(intro), grid(), "## What reads an artifact", engines())


def cli_page() -> str:
    """Help of the program and of every command that is not hidden."""
    from typer.main import get_command

    from poise.cli import app

    root = get_command(app)
    commands = {name: command for name, command in root.commands.items() if not command.hidden}  # type: ignore[attr-defined]
    intro = (
        "Results go to stdout, progress and messages to stderr. Exit codes: 0 done or passed, 1 error, 2 wrong "
        "usage, 3 a quality gate is missed, 4 more samples are needed, 5 something is not installed, 130 interrupted."
    )
    parts = [_wrap(intro), "## poise", _help(root, "poise")]
    for name, command in commands.items():
        parts += [f"## poise {name}", _help(command, f"poise {name}")]
        for inner, below in getattr(command, "commands", {}).items():
            parts += [f"## poise {name} {inner}", _help(below, f"poise {name} {inner}")]
    return _page("Command line", *parts)


def recipes_page() -> str:
    """Every recipe that comes with Poise, as people read it and as the program does."""
    from poise.planning.recipe import load_recipe, shipped_recipes

    intro = (
        "Give the name to `poise quantize --recipe`, or copy the YAML into a file of your own and give its path. "
        "What the keys mean is in [Plan](concepts/plan.md)."
    )
    parts = [_wrap(intro)]
    for name in shipped_recipes():
        yaml = (resources.files("poise.recipes") / f"{name}.yaml").read_text(encoding="utf-8")
        description = " ".join(load_recipe(name).description.split())
        parts += [f"## {name}", _wrap(description), f"```yaml\n{yaml.rstrip()}\n```"]
    return _page("Recipes", *parts)


def formats_page() -> str:
    """Every number format: what it is for, what it costs and what it loses."""
    from formats_page import parts

    return _page(
        "Number formats", *(part if part.startswith(("|", "#", "!")) else _wrap(part) for part in parts())
    )


def quality_page() -> str:
    """What solvers and presets gain."""
    from quality_page import parts

    return _page("Quality", *(part if part.startswith(("|", "#")) else _wrap(part) for part in parts()))


def evaluation_page() -> str:
    """How far evaluation agrees with others' tools and with itself."""
    from evaluation_page import parts

    return _page(
        "Evaluation, checked", *(part if part.startswith(("|", "#")) else _wrap(part) for part in parts())
    )


def rate_picture() -> str:
    """Error against bits."""
    from formats_page import rate_picture

    return rate_picture()


def levels_picture() -> str:
    """The levels of scalar formats."""
    from formats_page import levels_picture

    return levels_picture()


PAGES: dict[str, Callable[[], str]] = {
    "grid.md": grid_page,
    "cli.md": cli_page,
    "recipes.md": recipes_page,
    "formats.md": formats_page,
    "quality.md": quality_page,
    "evaluation-checked.md": evaluation_page,
    "pictures/rate.svg": rate_picture,
    "pictures/levels.svg": levels_picture,
}


def main() -> None:
    """Writes the pages, or checks that they are up to date."""
    parser = argparse.ArgumentParser(description="Write the pages of docs/ that follow from the code.")
    parser.add_argument("--check", action="store_true", help="write nothing; exit with 1 if a page differs")
    check = parser.parse_args().check
    stale = []
    for name, page in PAGES.items():
        path, text = FOLDER / name, page()
        if path.is_file() and path.read_text(encoding="utf-8") == text:
            continue
        stale.append(name)
        if not check:
            path.write_text(text, encoding="utf-8")
    if check and stale:
        print(f"out of date: {', '.join(f'docs/{name}' for name in stale)}; run make docs", file=sys.stderr)
        sys.exit(1)


def _page(title: str, *parts: str) -> str:
    return "\n\n".join([f"# {title}", NOTE, *(part.rstrip() for part in parts)]) + "\n"


def _wrap(text: str) -> str:
    return fill(text, 110, break_long_words=False, break_on_hyphens=False)


def _help(command: object, path: str) -> str:
    """Help without colours and frames, at a fixed width whatever the terminal."""
    command.rich_markup_mode = None  # type: ignore[attr-defined]
    context = command.context_class(command, info_name=path, terminal_width=WIDTH, max_content_width=WIDTH)  # type: ignore[attr-defined]
    text = command.get_help(context)  # type: ignore[attr-defined]
    lines = [line.rstrip() for line in text.strip("\n").splitlines()]
    return "```text\n" + "\n".join(lines) + "\n```"


if __name__ == "__main__":
    main()
