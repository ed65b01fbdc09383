"""The command line: one subcommand a file."""

import signal
import sys
from types import FrameType
from typing import NoReturn

import typer

from poise.cli import (
    bench,
    calibrate,
    compare,
    doctor,
    evaluate,
    formats,
    inspect,
    probe,
    quantize,
    report,
    vote,
)
from poise.core.errors import PoiseError

app = typer.Typer(
    name="poise",
    help="Quantize language models, prove what was lost, run them on the engines people use.",
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)
app.command("quantize")(quantize.run)
app.command("evaluate")(evaluate.run)
app.command("compare")(compare.run)
app.command("report")(report.run)
app.command("vote")(vote.run)
app.add_typer(calibrate.app, name="calibrate")
app.command("inspect")(inspect.run)
app.command("formats")(formats.run)
app.command("bench")(bench.run)
app.command("doctor")(doctor.run)
app.command("probe", hidden=True)(probe.run)


class _Interrupted(BaseException):
    """Ctrl-C. Not a KeyboardInterrupt, which typer would answer without saying how to go on."""


def _interrupt(_: int, __: FrameType | None) -> None:
    raise _Interrupted


def main() -> None:
    """Runs a command; an error of ours is one line on stderr and its exit code, Ctrl-C is 130."""
    signal.signal(signal.SIGINT, _interrupt)
    try:
        app()
    except PoiseError as error:
        _fail(str(error), error.exit_code)
    except OSError as error:
        _fail(str(error), PoiseError.exit_code)
    except _Interrupted:
        _fail("interrupted; what is finished is kept, --resume continues", 130)


def _fail(message: str, code: int) -> NoReturn:
    """One line, whatever the library that it is quoted from wrote."""
    print(f"poise: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(code)
