"""Errors that a user can act on. Each carries the exit code the command line ends with."""


class PoiseError(Exception):
    """Something went wrong; the message says what was asked, what came, and what to do."""

    exit_code = 1


class UsageError(PoiseError):
    """The request itself cannot be met: an unknown name, a bad recipe, an output that exists."""

    exit_code = 2


class CheckpointError(PoiseError):
    """A source model is missing, damaged, hostile or of an unknown architecture."""


class FormatError(PoiseError):
    """A number format cannot represent what it was given."""


class ExportError(PoiseError):
    """A container cannot hold the model, or what was read back is not what was meant."""


class EngineError(PoiseError):
    """A runtime refused the model or answered something that makes no sense."""


class MissingExtra(PoiseError):
    """An optional dependency is not installed.

    Args:
        package: the distribution that could not be imported, e.g. ``xllamacpp``.
        extra: the extra of Poise that installs it, e.g. ``llamacpp``.
    """

    exit_code = 5

    def __init__(self, package: str, extra: str) -> None:
        super().__init__(
            f"this needs the package {package!r}, which is not installed: pip install 'poise[{extra}]'"
        )


class PoiseWarning(UserWarning):
    """Something was mended or is doubtful, and the result may show it; kept in the record of the run."""
